"""Joining the steps of text generation to one record per layer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.components.summary import Top
from regard.watch.recording.record import Record


def join(records: Sequence[Record]) -> list[Record]:
    """Join the records of a layer over consecutive forward passes that continue one another.

    A pass continues the one before if it has fewer queries than keys, in every decoder layer, and these keys are those
    of the steps before: all of them, as with a growing cache; the last ones, as with a sliding window; or all of them
    and more that receive nothing, as with a static cache. Records of other passes, and of layers that cannot be followed,
    are returned unchanged. The result is in the order of the first steps; joined records have no `rows`, whose indices
    refer to single steps.
    """
    steps_by_record: list[list[_Step]] = []
    last_pass: dict[tuple[str, int], list[_Step]] = {}  # the steps so far, by name and layer
    for _, group in itertools.groupby(records, key=lambda record: record.call):
        calls = list(group)
        if not _continues(calls, last_pass):
            last_pass = {}
        for record in calls:
            steps = last_pass.setdefault((record.name, record.layer), [])
            offset = _offset(record, steps)
            if offset is None:  # the layer cannot be followed: it starts anew
                steps = last_pass[record.name, record.layer] = []
                offset = 0
            if not steps:
                steps_by_record.append(steps)
            steps.append(_Step(record, offset))
    return [steps[0].record if len(steps) == 1 else _concatenate(steps) for steps in steps_by_record]


class _Step(NamedTuple):
    record: Record
    offset: int  # the position of the first of its keys


def _continues(calls: Sequence[Record], last_pass: dict[tuple[str, int], list[_Step]]) -> bool:
    """Return whether a forward pass continues the one before."""
    decoders = [record for record in calls if record.kind == "decoder"]
    known = [record for record in decoders if (record.name, record.layer) in last_pass]
    return bool(known) and all(record.queries < record.keys for record in known) and any(
        _offset(record, last_pass[record.name, record.layer]) is not None for record in known
    )  # fmt: skip


def _offset(record: Record, steps: Sequence[_Step]) -> int | None:
    """Return the position of the first key of the next step of a layer; None if it is not the next step."""
    if not steps:
        return 0
    before = steps[-1].record
    if (before.kind, before.heads, before.max.shape[0]) != (record.kind, record.heads, record.max.shape[0]):
        return None
    if record.kind == "cross":
        return 0 if record.keys == before.keys else None
    if record.kind != "decoder":
        return None
    first = steps[0].record
    past = max(_visible_keys(first) - first.queries, 0)  # of a generation that began before
    positions = past + sum(step.record.queries for step in steps) + record.queries
    if record.keys <= positions:  # all keys so far, or the last ones
        return positions - record.keys
    # A static cache has room for more keys, which receive nothing.
    return 0 if _visible_keys(record) == positions else None


def _visible_keys(record: Record) -> int:
    """Return the number of keys up to the last one that is attended to."""
    if record.received is None:
        return int(record.top.keys.max()) + 1
    visible = (record.received > 0).flatten(0, -2).any(0).nonzero()
    return int(visible[-1]) + 1 if len(visible) else 0


def _concatenate(steps: Sequence[_Step]) -> Record:
    records = [step.record for step in steps]
    keys = max(step.offset + step.record.keys for step in steps)

    def cat_queries(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record in records]
        return None if any(part is None for part in parts) else torch.cat(parts, 2)

    received = None
    parts = [record.received for record in records if record.received is not None]
    if len(parts) == len(steps):
        padding = [(step.offset, keys - step.offset - step.record.keys) for step in steps]
        received = torch.stack([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)]).sum(0)
    maximum = cat_queries("max")
    assert maximum is not None
    top_keys = [step.record.top.keys + step.offset * (step.record.top.keys >= 0) for step in steps]
    return dataclasses.replace(
        records[0],
        queries=sum(record.queries for record in records),
        keys=keys,
        top=Top(torch.cat([record.top.weights for record in records], 2), torch.cat(top_keys, 2)),
        max=maximum,
        received=received,
        entropy=cat_queries("entropy"),
        rows=None,
    )
