"""What a page holds of records: an overview of every head, and as many heads in detail as fit.

A head in detail has all weights that its record lists; one in overview has a picture of 32 x 32 cells, each the largest
weight in it, and its sums in 256 parts. A page of a short text holds every head in detail.
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
from regard.view.brief import HABITS, Brief, briefs
from regard.view.record import Record, Rows, Sides, check, label, rows
from regard.view.token import Reading, read

_ENTRIES = 4_000_000  # weights a page holds, about 6 MB; beyond, a row keeps its largest and the page states the rest
_LEAST = 8  # but so many of each row, if need be of fewer heads
_CELLS, _PARTS = 32, 256


@dataclass(frozen=True)
class PageInput:
    """What a model attended to in a text: the records, the tokens as `page` takes them, and a name to tell it by."""

    name: str
    records: Sequence[Record]
    tokens: Sequence[str]
    key_tokens: Sequence[str] | None = None

    @property
    def texts(self) -> list[list[str]]:
        """Its texts, that of the queries first."""
        return [list(self.tokens)] if self.key_tokens is None else [list(self.tokens), list(self.key_tokens)]


class Data:
    """What was seen, in one model and text or in several, and what is told of each head; `batch` is the entry of B that is
    shown.
    """

    def __init__(self, seen: Sequence[PageInput], batch: int = 0) -> None:
        self.records = [record for one in seen for record in one.records]
        self._batch = batch
        self._most = max(_LEAST, _ENTRIES // max(1, sum(record.heads * record.queries for record in self.records)))
        self._texts: list[list[Reading]] = []
        self._names: list[str] = []  # of the texts
        self.told: list[list[Brief]] = []
        self._layers: list[dict[str, Any]] = []
        for one in seen:
            self._add(one, base=self._read(one, seen), name=f"{one.name}: " if len(seen) > 1 else "")

    def _read(self, one: PageInput, seen: Sequence[PageInput]) -> int:
        """Take up the texts of one, and give the number of the first; two models that read the same text share it."""
        shared = all(other.texts == seen[0].texts for other in seen)
        if shared and self._texts:
            return 0
        base = len(self._texts)
        self._texts += [read(text) for text in one.texts]
        names = ("Text", "Source") if shared else (one.name, f"{one.name}, source")
        self._names += names[: len(one.texts)]
        return base

    def _add(self, one: PageInput, base: int, name: str) -> None:
        for record, side in zip(one.records, check(one.records, one.tokens, one.key_tokens, self._batch), strict=True):
            found = rows(record, self._batch)
            told = briefs(record, found, side)
            layer = _layer(record, side, found, told, self._most)
            layer["label"] = name + layer["label"]
            layer["queryText"] += base
            layer["keyText"] += base
            self.told.append(told)
            self._layers.append(layer)

    def whole(self, budget: int) -> dict[str, Any]:
        """All of it as JSON has it, with heads in detail until their text is so many bytes."""
        order, short = self._by_interest(), self._is_short(budget)
        start = order[0]
        details: dict[tuple[int, int], dict[str, Any]] = {}
        size = sum(len(reading.text) + len(reading.raw) + 12 for text in self._texts for reading in text)
        size += sum(len(layer["heads"]) for layer in self._layers) * (_CELLS**2 * 4 // 3 + 2 * _PARTS * 2 + 300)
        layers = [self._layers[n] | {"heads": list(self._layers[n]["heads"])} for n in range(len(self._layers))]
        for layer, head in order:
            if (layer, head) not in details:
                # Those of a layer are packed together as long as everything is likely to fit.
                together = range(self.records[layer].heads) if short else [head]
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
        """Some heads of a layer, with all weights that are listed."""
        record = self.records[layer]
        seen = rows(record, self._batch, heads)
        packed = pack.heads(seen, self._most)
        rest = (1 - seen.weights[..., : self._most].sum(-1)).clamp(0, 1)
        entropy = None if seen.entropy is None else pack.quantised(seen.entropy, pack.THOUSAND)
        return [
            {
                "rows": packed[n],
                "rest": pack.varints(pack.quantised(rest[n], pack.ONE)),
                "entropy": None if entropy is None else pack.varints(entropy[n]),
                "received": pack.varints(pack.quantised(seen.received[n], pack.THOUSAND)),
                "cells": None,
            }
            for n in range(len(heads))
        ]

    def _is_short(self, budget: int) -> bool:
        entries = sum(r.heads * r.queries * min(r.top.keys.shape[-1], self._most) for r in self.records)
        return 3 * entries < budget

    def _by_interest(self) -> list[tuple[int, int]]:
        """All heads: the sharpest link across the text first, in cross attention if there is any; then a head of each
        layer in turns.
        """
        places = [(layer, head) for layer, heads in enumerate(self.told) for head in range(len(heads))]
        if not places:
            return [(0, 0)]
        first = max(places, key=self._interest)
        turn: dict[tuple[int, int], int] = {}
        for layer, heads in enumerate(self.told):
            order = sorted(range(len(heads)), key=lambda head: -self._interest((layer, head)))
            turn |= {(layer, head): n for n, head in enumerate(order)}
        return sorted(places, key=lambda place: (place != first, turn[place], place))

    def _interest(self, place: tuple[int, int]) -> float:
        brief = self.told[place[0]][place[1]]
        cross = 1.0 if self.records[place[0]].kind == "cross" else 0.0
        if brief.pattern == "pair" and brief.pair is not None:
            near = not cross and abs(brief.pair.query - brief.pair.key) < 3  # a neighbour tells less of the text
            sharp = brief.pair.weight * (0.6 if near else 1.0)
            return cross + 1 + sharp - 0.5 * (brief.entropy or 0.0) / max(brief.room, 1e-9)
        return cross + brief.telling


def _layer(record: Record, side: Sides, seen: Rows, told: list[Brief], most: int) -> dict[str, Any]:
    """A layer with its heads in overview."""
    cells = _cells(seen, record.queries, record.keys)
    received, entropy = _pooled(seen.received), None if seen.entropy is None else _pooled(seen.entropy)
    distance = _distance(record, seen)
    return {
        "label": label(record, side),
        "name": record.name,
        "kind": record.kind,
        "queryText": side.query_text,
        "keyText": side.key_text,
        "queries": record.queries,
        "keys": record.keys,
        "offset": seen.offset,  # of the first query in its text
        "causal": record.causal,
        "top": min(int(seen.keys.shape[-1]), most),
        "receivedExact": seen.received_exact,
        "heads": [
            {
                "rows": None,
                "rest": None,
                "cells": base64.b64encode(bytes(cells[head].flatten().tolist())).decode("ascii"),
                "entropy": None if entropy is None else pack.varints(pack.quantised(entropy[head], pack.THOUSAND)),
                "received": pack.varints(pack.quantised(received[head], pack.THOUSAND)),
                "distance": None if distance is None else round(float(distance[head]), 2),
                "pattern": brief.pattern,
                "words": brief.words,
                "sentence": brief.sentence,
                "meanEntropy": None if brief.entropy is None else round(brief.entropy, 3),
                "room": round(brief.room, 3),
                "pair": brief.pair and [brief.pair.query, brief.pair.key, round(brief.pair.weight, 3)],
            }
            for head, brief in enumerate(told)
        ],
    }


def _cells(seen: Rows, queries: int, keys: int) -> Tensor:
    """The largest listed weight of each cell (H, h, w), as bytes: 0 where nothing is listed, else 1 + 254 sqrt(weight)."""
    high, wide = min(_CELLS, queries), min(_CELLS, keys)
    down = torch.arange(queries)[:, None] * high // max(queries, 1)
    place = (down * wide + seen.keys.clamp(min=0) * wide // max(keys, 1)).flatten(1)
    shades = 1 + (254 * seen.weights.clamp(0, 1).sqrt()).round()
    shades = shades.masked_fill(~seen.listed, 0).flatten(1)
    out = torch.zeros(len(shades), high * wide).scatter_reduce_(1, place, shades, "amax")
    return out.view(-1, high, wide).to(torch.uint8)


def _pooled(numbers: Tensor) -> Tensor:
    """The largest number (H, n) of each of at most 256 parts."""
    size = numbers.shape[-1]
    if size <= _PARTS:
        return numbers
    place = (torch.arange(size) * _PARTS // size).expand_as(numbers)
    return numbers.new_zeros(len(numbers), _PARTS).scatter_reduce_(1, place, numbers, "amax")


def _distance(record: Record, seen: Rows) -> Tensor | None:
    """How many tokens lie between a query and what it looks at, on average over the weight that is listed (H,)."""
    if record.kind == "cross":
        return None
    own = torch.arange(record.queries)[:, None] + seen.offset
    apart = (seen.weights * (seen.keys - own).abs() * seen.listed).sum((-1, -2))
    return apart / seen.weights.sum((-1, -2)).clamp(min=1e-9)


def _token(reading: Reading) -> list[str | int]:
    """[text, 1 if it continues a word, 1 if a marker, raw where that differs], cut short at the end where it can be."""
    token: list[str | int] = [reading.text, int(reading.continues), int(reading.marker)]
    return token if reading.raw == reading.text else [*token, reading.raw]


__getattr__ = getter("regard.view.data")
