"""The data of a page: an overview of every head, and the details of as many heads as fit.

The details of a head are all weights that its record lists. Its overview is an image of 32 x 32 cells, each the largest
weight in it, and its received attention and entropy, max-pooled to 256 values. A page of a short text holds the details
of every head.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.deprecated import getter
from regard.view import pack
from regard.view.describe import HABITS, HeadDescription, describe_heads
from regard.view.record import RecordLike, Rows, Sides, check, label, rows
from regard.view.remarks import remarks
from regard.view.token import Reading, read

_MAX_ENTRIES = 4_000_000  # weights per page, about 6 MB; beyond it, rows keep their largest weights only
_MIN_PER_ROW = 8  # at least this many weights per row; fewer heads have details then
_CELLS, _BINS = 32, 256  # cells per side of the overview, values of received attention and entropy


@dataclass(frozen=True)
class PageInput:
    """The attention of one model on one text: its name, its records, and the tokens, with the arguments of `page`.

    >>> PageInput("translator", [], ["le", "chat"], ["the", "cat"]).texts
    [['le', 'chat'], ['the', 'cat']]
    """

    name: str
    records: Sequence[RecordLike]
    tokens: Sequence[str]
    key_tokens: Sequence[str] | None = None
    produced: Sequence[str] | None = None

    @property
    def texts(self) -> list[list[str]]:
        """Its texts: that of the queries, that of the keys of cross attention, and what a decoder produces."""
        return [list(text) for text in (self.tokens, self.key_tokens, self.produced) if text is not None]

    @property
    def read(self) -> list[Sequence[str]]:
        """The texts that the model reads."""
        return [text for text in (self.tokens, self.key_tokens) if text is not None]


class Data:
    """The records of one or several models and texts, with a description of each head.

    Args:
        inputs: the models and their texts.
        batch: the index in B that is shown.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> data = Data([PageInput("a layer", records, ["the", "cat", "sat"])]).to_json(budget=10000)
    >>> data["texts"], [len(layer["heads"]) for layer in data["layers"]]
    ([[['the', 0, 0], ['cat', 0, 0], ['sat', 0, 0]]], [2])
    """

    def __init__(self, inputs: Sequence[PageInput], batch: int = 0) -> None:
        self.records = [record for one in inputs for record in one.records]
        self._batch = batch
        self._limit = max(
            _MIN_PER_ROW, _MAX_ENTRIES // max(1, sum(record.heads * record.queries for record in self.records))
        )
        self._texts: list[list[Reading]] = []
        self._names: list[str] = []  # of the texts
        self.descriptions: list[list[HeadDescription]] = []
        self._layers: list[dict[str, Any]] = []
        self.remarks = list(dict.fromkeys(remark for one in inputs for remark in remarks(*one.read)))
        for one in inputs:
            self._add_layers(one, base=self._add_texts(one, inputs), name=f"{one.name}: " if len(inputs) > 1 else "")

    def _add_texts(self, one: PageInput, inputs: Sequence[PageInput]) -> int:
        """Add the texts of an input and return the index of the first; inputs with equal texts share them."""
        shared = all(other.texts == inputs[0].texts for other in inputs)
        if shared and self._texts:
            return 0
        base = len(self._texts)
        self._texts += [read(text) for text in one.texts]
        names: tuple[str, ...] = ("Text", "Source") if shared else (one.name, f"{one.name}, source")
        if one.produced is not None:
            names = ("Output so far", "Source", "Output") if shared else (*names, f"{one.name}, output")
        self._names += names[: len(one.texts)]
        return base

    def _add_layers(self, one: PageInput, base: int, name: str) -> None:
        sides = check(one.records, one.tokens, one.key_tokens, self._batch, one.produced)
        for record, side in zip(one.records, sides, strict=True):
            entries = rows(record, self._batch)
            descriptions = describe_heads(record, entries, side)
            layer = _layer(record, side, entries, descriptions, self._limit)
            layer["label"] = name + layer["label"]
            layer["queryText"] += base
            layer["keyText"] += base
            # What the queries read, where they are named by what is produced.
            layer["inputText"] = base if side.query_text == 2 else None
            self.descriptions.append(descriptions)
            self._layers.append(layer)

    def to_json(self, budget: int) -> dict[str, Any]:
        """Return the data as a JSON object, with details of heads until it has `budget` bytes."""
        order, is_short = self._by_interest(), self._is_short(budget)
        start = order[0]
        details: dict[tuple[int, int], dict[str, Any]] = {}
        size = sum(len(reading.text) + len(reading.raw) + 12 for text in self._texts for reading in text)
        size += sum(len(layer["heads"]) for layer in self._layers) * (_CELLS**2 * 4 // 3 + 2 * _BINS * 2 + 300)
        layers = [self._layers[n] | {"heads": list(self._layers[n]["heads"])} for n in range(len(self._layers))]
        for layer, head in order:
            if (layer, head) not in details:
                # All heads of a layer are packed in one call if everything is likely to fit.
                together = range(self.records[layer].heads) if is_short else [head]
                for n, packed in zip(together, self.details(layer, list(together)), strict=True):
                    details[layer, n] = packed
            packed = details[layer, head]
            size += sum(len(part) for part in packed.values() if isinstance(part, str))
            if size > budget and (layer, head) != start:
                break
            layers[layer]["heads"][head] = self._layers[layer]["heads"][head] | packed
        return {
            "one": pack.ONE,
            "thousand": pack.THOUSAND,
            "habits": HABITS,
            "names": self._names,
            "texts": [[_token(reading) for reading in text] for text in self._texts],
            "layers": layers,
            "start": list(start),
        }

    def details(self, layer: int, heads: Sequence[int]) -> list[dict[str, Any]]:
        """Return the details of some heads of a layer: all weights that are listed."""
        record = self.records[layer]
        entries = rows(record, self._batch, heads)
        packed = pack.encode_rows(entries, self._limit)
        rest = (1 - entries.weights[..., : self._limit].sum(-1)).clamp(0, 1)
        entropy = None if entries.entropy is None else pack.quantize(entries.entropy, pack.THOUSAND)
        return [
            {
                "rows": packed[n],
                "rest": pack.encode_varints(pack.quantize(rest[n], pack.ONE)),
                "entropy": None if entropy is None else pack.encode_varints(entropy[n]),
                "received": pack.encode_varints(pack.quantize(entries.received[n], pack.THOUSAND)),
                "cells": None,
            }
            for n in range(len(heads))
        ]

    def _is_short(self, budget: int) -> bool:
        entries = sum(r.heads * r.queries * min(r.top.keys.shape[-1], self._limit) for r in self.records)
        return 3 * entries < budget

    def _by_interest(self) -> list[tuple[int, int]]:
        """Return (layer, head) of all heads in the order of inclusion: the most interesting head first, of cross
        attention if there is any; then one head per layer in turn, by decreasing interest.
        """
        pairs = [(layer, head) for layer, heads in enumerate(self.descriptions) for head in range(len(heads))]
        if not pairs:
            return [(0, 0)]
        first = max(pairs, key=self._interest)
        turn: dict[tuple[int, int], int] = {}
        for layer, heads in enumerate(self.descriptions):
            order = sorted(range(len(heads)), key=lambda head: -self._interest((layer, head)))
            turn |= {(layer, head): n for n, head in enumerate(order)}
        return sorted(pairs, key=lambda pair: (pair != first, turn[pair], pair))

    def _interest(self, head: tuple[int, int]) -> float:
        description = self.descriptions[head[0]][head[1]]
        cross = 1.0 if self.records[head[0]].kind == "cross" else 0.0
        if description.pattern == "pair" and description.pair is not None:
            # Links between neighbors are less informative.
            near = not cross and abs(description.pair.query - description.pair.key) < 3
            sharpness = description.pair.weight * (0.6 if near else 1.0)
            return cross + 1 + sharpness - 0.5 * (description.entropy or 0.0) / max(description.max_entropy, 1e-9)
        return cross + description.interest


def _layer(
    record: RecordLike, side: Sides, entries: Rows, descriptions: list[HeadDescription], limit: int
) -> dict[str, Any]:
    """Return a layer with the overviews of its heads."""
    cells = _cells(entries, record.queries, record.keys)
    received, entropy = _max_pool(entries.received), None if entries.entropy is None else _max_pool(entries.entropy)
    distance = _distance(record, entries)
    return {
        "label": label(record, side),
        "name": record.name,
        "kind": record.kind,
        "queryText": side.query_text,
        "keyText": side.key_text,
        "queries": record.queries,
        "keys": record.keys,
        "offset": entries.offset,  # position of the first query in its text
        "causal": record.causal,
        "top": min(int(entries.keys.shape[-1]), limit),
        "receivedExact": entries.received_exact,
        "heads": [
            {
                "rows": None,
                "rest": None,
                "cells": base64.b64encode(bytes(cells[head].flatten().tolist())).decode("ascii"),
                "entropy": None
                if entropy is None
                else pack.encode_varints(pack.quantize(entropy[head], pack.THOUSAND)),
                "received": pack.encode_varints(pack.quantize(received[head], pack.THOUSAND)),
                "distance": None if distance is None else round(float(distance[head]), 2),
                "pattern": description.pattern,
                "words": description.text,
                "sentence": description.sentence,
                "meanEntropy": None if description.entropy is None else round(description.entropy, 3),
                "room": round(description.max_entropy, 3),
                "pair": description.pair
                and [description.pair.query, description.pair.key, round(description.pair.weight, 3)],
            }
            for head, description in enumerate(descriptions)
        ],
    }


def _cells(entries: Rows, queries: int, keys: int) -> Tensor:
    """Max-pool the listed weights to cells (H, h, w), uint8: 0 where nothing is listed, else 1 + 254 sqrt(weight)."""
    high, wide = min(_CELLS, queries), min(_CELLS, keys)
    down = torch.arange(queries)[:, None] * high // max(queries, 1)
    cell = (down * wide + entries.keys.clamp(min=0) * wide // max(keys, 1)).flatten(1)
    shades = 1 + (254 * entries.weights.clamp(0, 1).sqrt()).round()
    shades = shades.masked_fill(~entries.listed, 0).flatten(1)
    out = torch.zeros(len(shades), high * wide).scatter_reduce_(1, cell, shades, "amax")
    return out.view(-1, high, wide).to(torch.uint8)


def _max_pool(numbers: Tensor) -> Tensor:
    """Max-pool (H, n) to at most 256 values per head."""
    size = numbers.shape[-1]
    if size <= _BINS:
        return numbers
    bins = (torch.arange(size) * _BINS // size).expand_as(numbers)
    return numbers.new_zeros(len(numbers), _BINS).scatter_reduce_(1, bins, numbers, "amax")


def _distance(record: RecordLike, entries: Rows) -> Tensor | None:
    """Return the mean distance in tokens between queries and keys, weighted by the listed weights (H,)."""
    if record.kind == "cross":
        return None
    own = torch.arange(record.queries)[:, None] + entries.offset
    total = (entries.weights * (entries.keys - own).abs() * entries.listed).sum((-1, -2))
    return total / entries.weights.sum((-1, -2)).clamp(min=1e-9)


def _token(reading: Reading) -> list[str | int]:
    """Return [text, 1 if it continues a word, 1 if it is a marker], plus the raw token if it differs from the text."""
    token: list[str | int] = [reading.text, int(reading.continues), int(reading.marker)]
    return token if reading.raw == reading.text else [*token, reading.raw]


__getattr__ = getter("regard.view.data")
