"""Joining the steps of text generation to one record per layer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.components.summary import Top
from regard.watch.recording.record import Record


def join(records: Sequence[Record]) -> list[Record]:
    """Join the records of a layer over consecutive forward passes that continue one another.

    A pass continues the one before if the queries of all its decoder layers follow the keys of that one, as with a
    key/value cache. Records of other passes are returned unchanged. The result is in the order of the first steps;
    joined records have no `rows`, whose indices refer to single steps.
    """
    steps_by_record: list[list[Record]] = []
    last_pass: dict[tuple[str, int], list[Record]] = {}  # the steps so far, by name and layer
    for _, group in itertools.groupby(records, key=lambda record: record.call):
        calls = list(group)
        if not _continues(calls, last_pass):
            last_pass = {}
        for record in calls:
            steps = last_pass.setdefault((record.name, record.layer), [])
            if not steps:
                steps_by_record.append(steps)
            steps.append(record)
    return [steps[0] if len(steps) == 1 else _concatenate(steps) for steps in steps_by_record]


def _continues(calls: Sequence[Record], last_pass: dict[tuple[str, int], list[Record]]) -> bool:
    for record in calls:
        if not (steps := last_pass.get((record.name, record.layer))):
            return False
        before = steps[-1]
        follows = (
            record.keys - record.queries == before.keys if record.kind == "decoder" else record.keys == before.keys
        )
        is_same_layer = (before.kind, before.heads, before.max.shape[0]) == (
            record.kind,
            record.heads,
            record.max.shape[0],
        )
        if record.kind == "self" or not is_same_layer or not follows:
            return False
    return any(record.kind == "decoder" for record in calls)


def _concatenate(steps: Sequence[Record]) -> Record:
    keys = steps[-1].keys

    def cat_queries(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record in steps]
        return None if any(part is None for part in parts) else torch.cat(parts, 2)

    received = None
    if all(record.received is not None for record in steps):
        received = torch.stack([F.pad(record.received, (0, keys - record.keys)) for record in steps]).sum(0)  # type: ignore[arg-type]
    maximum = cat_queries("max")
    assert maximum is not None
    return dataclasses.replace(
        steps[0],
        queries=sum(record.queries for record in steps),
        keys=keys,
        top=Top(*(torch.cat(parts, 2) for parts in zip(*(record.top for record in steps), strict=True))),
        max=maximum,
        received=received,
        entropy=cat_queries("entropy"),
        rows=None,
    )
