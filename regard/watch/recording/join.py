"""A text that was generated step by step, as if it had been read at once."""

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
    """One record for all steps of a layer that continue one another.

    A run of the model continues the one before where the queries of all its decoders stand behind the keys that these had:
    they keep their keys. What continues nothing stays by itself. `rows` are those of single steps, and are left out of
    what is joined. The order is that of the first steps.
    """
    joined: list[list[Record]] = []
    last: dict[tuple[str, int], list[Record]] = {}  # what the run before this one saw, by name and layer
    for _, run in itertools.groupby(records, key=lambda record: record.call):
        calls = list(run)
        if not _continues(calls, last):
            last = {}
        for record in calls:
            steps = last.setdefault((record.name, record.layer), [])
            if not steps:
                joined.append(steps)
            steps.append(record)
    return [steps[0] if len(steps) == 1 else _joined(steps) for steps in joined]


def _continues(calls: Sequence[Record], last: dict[tuple[str, int], list[Record]]) -> bool:
    for record in calls:
        if not (steps := last.get((record.name, record.layer))):
            return False
        before = steps[-1]
        follows = (
            record.keys - record.queries == before.keys if record.kind == "decoder" else record.keys == before.keys
        )
        alike = (before.kind, before.heads, before.max.shape[0]) == (record.kind, record.heads, record.max.shape[0])
        if record.kind == "self" or not alike or not follows:
            return False
    return any(record.kind == "decoder" for record in calls)


def _joined(run: Sequence[Record]) -> Record:
    keys = run[-1].keys

    def rows(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record in run]
        return None if any(part is None for part in parts) else torch.cat(parts, 2)

    received = None
    if all(record.received is not None for record in run):
        received = torch.stack([F.pad(record.received, (0, keys - record.keys)) for record in run]).sum(0)  # type: ignore[arg-type]
    most = rows("max")
    assert most is not None
    return dataclasses.replace(
        run[0],
        queries=sum(record.queries for record in run),
        keys=keys,
        top=Top(*(torch.cat(parts, 2) for parts in zip(*(record.top for record in run), strict=True))),
        max=most,
        received=received,
        entropy=rows("entropy"),
        rows=None,
    )
