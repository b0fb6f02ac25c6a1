"""Conversion of records to NumPy, pandas and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.watch.recording.record import Record
from regard.watch.recording.store import Tokens, named_texts

_SUMMARIES = ("max", "received", "entropy", "rows")


def to_numpy(record: Record) -> dict[str, Any]:
    """Return the tensors of a record as arrays: weights, keys, max, and received, entropy and rows where recorded."""
    tensors = {"weights": record.top.weights, "keys": record.top.keys}
    tensors |= {name: getattr(record, name) for name in _SUMMARIES if getattr(record, name) is not None}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def to_pandas(records: Sequence[Record], tokens: Tokens, key_tokens: Tokens, produced: Tokens) -> Any:
    """Return a data frame with one row per recorded weight."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames require pandas: pip install 'regard[watch]'") from error
    frames = []
    for record in records:
        indices = torch.nonzero(record.top.keys >= 0, as_tuple=True)
        batch, head, query, _ = indices
        columns = {
            "batch": batch,
            "head": head,
            "query": query,
            "key": record.top.keys[indices],
            "weight": record.top.weights[indices],
        }
        frame = pandas.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        for n, name in enumerate(("call", "layer", "name", "kind")):
            frame.insert(n, name, getattr(record, name))
        for side, names in zip(("query", "key"), _tokens_of(record, tokens, key_tokens, produced), strict=True):
            if names is not None:
                frame[f"{side}_token"] = [names[n] for n in frame[side]]
        frames.append(frame)
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def to_json(records: Sequence[Record], tokens: Tokens, key_tokens: Tokens, produced: Tokens) -> str:
    """Return a JSON object: {"tokens", "key_tokens", "produced", "records": [{"name", ..., "top": {...}, ...}]}."""

    def to_list(tensor: Tensor) -> Any:
        return tensor.cpu().tolist()

    entries = [
        {
            **{name: getattr(record, name) for name in ("name", "layer", "call", "kind", "heads", "queries", "keys")},
            "top": {"weights": to_list(record.top.weights), "keys": to_list(record.top.keys)},
            **{name: to_list(getattr(record, name)) for name in _SUMMARIES if getattr(record, name) is not None},
        }
        for record in records
    ]
    return json.dumps({**named_texts(tokens, key_tokens, produced), "records": entries})


def _tokens_of(record: Record, tokens: Tokens, key_tokens: Tokens, produced: Tokens) -> tuple[Tokens, Tokens]:
    """Return the tokens of a record's queries and of its keys; None where they are unknown or of another number.

    Cross-attention takes the queries from `produced`, or from `tokens`, and the keys from `key_tokens`. Self-attention
    takes both from the first of the two that has as many tokens as there are keys.
    """
    if record.kind == "cross":
        sources = tokens if key_tokens is None else key_tokens
        return _if_length(tokens if produced is None else produced, record.queries), _if_length(sources, record.keys)
    for names in (tokens, key_tokens):
        if names is not None and len(names) == record.keys >= record.queries:
            return names[record.keys - record.queries :], names
    return None, None


def _if_length(tokens: Tokens, length: int) -> Tokens:
    return tokens if tokens is not None and len(tokens) == length else None
