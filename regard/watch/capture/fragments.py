"""Which recorded calls are fragments: parts of an attention layer that computes in blocks, landmarks or chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from regard.watch.recording.record import Record


def are_fragments(records: Sequence[Record], args: Any, output: Any) -> bool:
    """Return whether calls made by a module are no attention over the positions of its arguments and outputs.

    The records of BigBird, for example, have the queries of one block each. A layer that divides its positions into
    windows or texts, each of which attends to itself, is complete: they are further batch rows.

    Args:
        records: of the calls that one run of the module made.
        args, output: what the module was called with, and what it returned.
    """
    out = output[0] if isinstance(output, tuple) and output else output
    if len(records) == 1 and isinstance(out, Tensor) and out.dim() > 2:
        shape, record = out.shape, records[0]
        if shape[0] == len(record.max) and record.queries in (shape[1], shape[-2]):
            return False  # the common case, in a fraction of the time
    # Further arguments are masks, which may have the shapes of blocks.
    first = [next(_tensors(value), None) for value in (args, output)]
    shapes = [tuple(x.shape) for x in first if x is not None and not x.is_nested and x.dim() >= 2]
    if not shapes or all(any(_fits(record, shape) for shape in shapes) for record in records):
        return False
    covered = sum(len(record.max) * record.queries for record in records)
    return not (
        all(record.queries == record.keys for record in records)
        and any(covered == batch * positions for shape in shapes for batch, positions in _layouts(shape))
    )


def _fits(record: Record, shape: tuple[int, ...]) -> bool:
    """Return whether a record has the queries of a tensor, one per position. Heads may be folded into the batch."""
    layouts = list(_layouts(shape))
    pooled = [(batch, 1) for batch, _ in layouts]
    return any(
        record.queries == positions and batch > 0 and len(record.max) % batch == 0
        for batch, positions in (*layouts, *pooled)
    )


def _layouts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of batch rows and positions of a tensor, for each order of its dimensions that is in use."""
    first, second = shape[:2]
    yield first, second
    if len(shape) == 2:
        yield 1, first  # (L, D)
        return
    yield first, prod(shape[2:])  # (B, C, L), (B, C, height, width)
    yield first, prod(shape[1:-1])  # (B, height, width, C)
    yield first, shape[-2]  # (B, H, L, D)
    yield second, first  # (L, B, D)
    for batch_dims in range(2, len(shape) - 1):
        yield prod(shape[:batch_dims]), prod(shape[batch_dims:-1])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value:
            if isinstance(part, Tensor | tuple | list | Mapping):
                yield from _tensors(part)
