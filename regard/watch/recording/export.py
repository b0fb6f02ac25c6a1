"""Records for other tools: NumPy, pandas and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.watch.recording.record import Record

_SUMMARIES = ("max", "received", "entropy", "rows")


def to_numpy(record: Record) -> dict[str, Any]:
    """The tensors of a record as arrays: weights, keys, max, and received, entropy and rows where they were asked for."""
    tensors = {"weights": record.top.weights, "keys": record.top.keys}
    tensors |= {name: getattr(record, name) for name in _SUMMARIES if getattr(record, name) is not None}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def to_pandas(records: Sequence[Record], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None) -> Any:
    """A data frame with a row for each weight that was kept."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame needs pandas: pip install 'regard[watch]'") from error
    frames = []
    for record in records:
        batch, head, query, place = torch.nonzero(record.top.keys >= 0, as_tuple=True)
        at = batch, head, query, place
        columns = {
            "batch": batch, "head": head, "query": query, "key": record.top.keys[at], "weight": record.top.weights[at],
        }  # fmt: skip
        frame = pandas.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        for n, name in enumerate(("call", "layer", "name", "kind")):
            frame.insert(n, name, getattr(record, name))
        texts = _texts_of(record, tokens, key_tokens)
        for side, text in zip(("query", "key"), texts, strict=True):
            if text is not None:
                frame[f"{side}_token"] = [text[n] for n in frame[side]]
        frames.append(frame)
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def to_json(records: Sequence[Record], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None) -> str:
    """Everything as one JSON object: {"tokens", "key_tokens", "records": [{"name", ..., "weights", "keys", ...}]}."""

    def listed(tensor: Tensor) -> Any:
        return tensor.cpu().tolist()

    described = [
        {
            **{name: getattr(record, name) for name in ("name", "layer", "call", "kind", "heads", "queries", "keys")},
            "top": {"weights": listed(record.top.weights), "keys": listed(record.top.keys)},
            **{name: listed(getattr(record, name)) for name in _SUMMARIES if getattr(record, name) is not None},
        }
        for record in records
    ]
    texts = {
        "tokens": None if tokens is None else list(tokens),
        "key_tokens": None if key_tokens is None else list(key_tokens),
    }
    return json.dumps({**texts, "records": described})


def _texts_of(
    record: Record, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """The texts of a record's queries and keys, where they are known and as long: `tokens` are the queries of cross
    attention, and both sides of all that they fit; `key_tokens` are the others.
    """
    if record.kind == "cross":
        sources = tokens if key_tokens is None else key_tokens
        return _fitting(tokens, record.queries), _fitting(sources, record.keys)
    for text in (tokens, key_tokens):
        if text is not None and len(text) == record.keys >= record.queries:
            return text[record.keys - record.queries :], text
    return None, None


def _fitting(text: Sequence[str] | None, size: int) -> Sequence[str] | None:
    return text if text is not None and len(text) == size else None
