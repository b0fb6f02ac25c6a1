"""Row blocks: the pieces that `tiled` computes a problem in.

A row block is a few rows of the score matrix and the keys that they may attend to. The tiles of the mask give these keys:
empty tiles are skipped, full tiles need no mask, and partial tiles evaluate the mask for each pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.components.normalizer import Softmax
from regard.components.statistic import Statistic
from regard.components.tile import Grid, Range, Sizes, Tile, concat_ranges
from regard.plan.problem import Plan

# Elements per row block (4 MiB in float32): larger blocks leave the caches, smaller ones need more calls of PyTorch.
_BLOCK_SIZE = 1 << 20
# Elements per segment while it is scored, for scores that hold several elements per pair.
_SEGMENT_SIZE = 1 << 22
# Rows and columns per mask tile. Long sequences take twice as many rows: there calls cost more than the pairs that a finer
# grid would skip. Columns cost no calls, since adjacent tiles are scored together.
_TILE = 64
_LONG = 1024


@dataclass(frozen=True)
class RowBlock:
    """The rows of `tile`, the ranges of keys they may attend to, and which parts of these need the mask."""

    tile: Tile
    columns: tuple[Range, ...]
    partial: tuple[Range, ...]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.columns)

    def columns_of(self, keys: Range) -> slice:
        """Return the columns of the block that hold a range of keys, which lies within one of the ranges in `columns`."""
        at = 0
        for start, stop in self.columns:
            if start <= keys[0] and keys[1] <= stop:
                return slice(at + keys[0] - start, at + keys[1] - start)
            at += stop - start
        raise AssertionError(f"keys {keys} are not in the columns {self.columns}")

    def segments(self, plan: Plan, width: int) -> list[Range]:
        """Return the ranges of keys, cut where the score holds many elements per pair; `width` is D."""
        rows = (self.tile.b[1] - self.tile.b[0]) * (self.tile.h[1] - self.tile.h[0]) * (self.tile.q[1] - self.tile.q[0])
        volume = plan.score.volume(width)
        longest = max(self.width if volume == 1 else max(_SEGMENT_SIZE // max(rows * volume, 1), 16), 1)
        return [(at, min(at + longest, stop)) for start, stop in self.columns for at in range(start, stop, longest)]

    def allowed(self, plan: Plan, keys: Range) -> Tensor:
        """Return the mask of a range of keys, True = may attend."""
        return plan.mask.allowed(dataclasses.replace(self.tile, k=keys))  # type: ignore[union-attr]

    def queries(self, x: Tensor) -> Tensor:
        """Return the rows of the block in a tensor (B, H, L, n), as a view."""
        return x[slice(*self.tile.b), slice(*self.tile.h), slice(*self.tile.q)]

    def keys(self, x: Tensor, keys: Range) -> Tensor:
        """Return a range of keys in a tensor (B, G, S, n), for the heads of the block, as a view."""
        return x[slice(*self.tile.b), slice(*self.tile.g), slice(*keys)]

    def all_keys(self, x: Tensor) -> Tensor:
        """Return the keys of all columns in a tensor (B, G, S, n), concatenated; one key of zeros where there is none."""
        parts = [self.keys(x, keys) for keys in self.columns]
        if not parts:
            return self.keys(x, (0, 0)).new_zeros(
                self.tile.b[1] - self.tile.b[0], self.tile.g[1] - self.tile.g[0], 1, x.shape[-1]
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def contributes_to(self, plan: Plan, names: Sequence[str]) -> tuple[str, ...]:
        """Return the outputs that the block contributes to. Without keys, a sink alone contributes to some."""
        if self.columns:
            return tuple(names)
        return tuple([x.name for x in plan.summary.statistics if x.name in names and x.includes_sink])


def write_output(statistic: Statistic | None, output: Tensor, block: RowBlock, value: Tensor) -> None:
    """Write the results of a block into an output: a statistic, or the output of attention (None)."""
    b, h, rows = _index(statistic, block)
    if statistic is None or "S" not in statistic.axes:
        output[b, h, rows] = value
        return
    for keys in block.columns:
        part, where = value[..., block.columns_of(keys)], slice(*keys)
        if rows is None:
            output[b, h, where] += part
        else:
            output[b, h, rows, where] = part


def read_gradient(statistic: Statistic, gradient: Tensor, block: RowBlock) -> Tensor:
    """Return the part of a statistic's gradient that belongs to a block: the inverse of `write_output`."""
    b, h, rows = _index(statistic, block)
    if "S" not in statistic.axes:
        return gradient[b, h, rows]
    if rows is None:
        return concat_ranges(block.columns, lambda keys: gradient[b, h, slice(*keys)])
    return concat_ranges(block.columns, lambda keys: gradient[b, h, rows, slice(*keys)])


def _index(statistic: Statistic | None, block: RowBlock) -> tuple[slice, slice, Any]:
    """Return the indices of a block in an output; None for the queries if the output is summed over them."""
    b, h, q = (slice(*r) for r in (block.tile.b, block.tile.h, block.tile.q))
    if statistic is None or "L" in statistic.axes:
        return b, h, q
    return b, h, statistic.rows_in(block.tile)[0] if "R" in statistic.axes else None


def row_blocks(plan: Plan, size: Sizes, device: torch.device) -> Iterator[RowBlock]:
    """Yield the row blocks of a problem. Together they hold every pair that may attend."""
    if not size.B * size.H * size.L:
        return
    has_sink = isinstance(plan.normalizer, Softmax) and plan.normalizer.sink is not None
    with_sink = has_sink and any(statistic.includes_sink for statistic in plan.summary.statistics)
    for b, rows, segments in _rows(plan, size, device):
        width = sum(stop - start for start, stop in segments[0])
        if not width and not with_sink:
            continue
        per_head = (b[1] - b[0]) * (rows[1] - rows[0]) * max(width, 1)
        for h in [(0, size.H)] if plan.score.takes_all_heads else _heads(size, per_head):
            tile = Tile(b, h, rows, (0, size.S), size, device)
            yield RowBlock(tile, *segments)


def _rows(
    plan: Plan, size: Sizes, device: torch.device
) -> Iterator[tuple[Range, Range, tuple[tuple[Range, ...], tuple[Range, ...]]]]:
    """Yield ranges of batch rows and queries, with their ranges of keys, and the partial ones among these."""
    if plan.mask is None or not size.S:
        # Many rows for few keys: as many as a block may hold for one head.
        step = min(max(_BLOCK_SIZE // max(size.H * size.S, 1), _TILE), 4 * _TILE)
        batch = max(_BLOCK_SIZE // max(size.H * min(step, size.L) * size.S, 1), 1)
        columns = ((0, size.S),) if size.S else ()
        for b in _steps(size.B, batch):
            for rows in _steps(size.L, step):
                yield b, rows, (columns, ())
        return
    tile = _TILE if max(size.L, size.S) <= _LONG else 2 * _TILE
    coverage = plan.mask.coverage(Grid.of(size, tile, _TILE, device))
    shared = all(x.shape[0] == 1 for x in coverage)
    any_allowed, full = (x.expand(1 if shared else size.B, -1, -1).tolist() for x in coverage)
    for index in range(len(any_allowed)):
        batch = max(_BLOCK_SIZE // (size.H * min(tile, size.L) * size.S), 1) if shared else 1
        for b in _steps(size.B, batch) if shared else [(index, index + 1)]:
            for rows, ranges, partial in _merged(any_allowed[index], full[index], tile, size):
                yield b, rows, (ranges, partial)


def _merged(
    any_allowed: Sequence[Sequence[bool]], full: Sequence[Sequence[bool]], tile: int, size: Sizes
) -> Iterator[tuple[Range, tuple[Range, ...], tuple[Range, ...]]]:
    """Yield rows of tiles with their ranges of keys and the partial ones; adjacent equal rows are merged while they fit."""
    row = 0
    while row < len(any_allowed):
        columns = _runs(any_allowed[row], size.S)
        partial = _runs([a and not b for a, b in zip(any_allowed[row], full[row], strict=True)], size.S)
        width = sum(stop - start for start, stop in columns)
        most = max(_BLOCK_SIZE // (size.H * max(width, 1) * tile), 1)
        last = row + 1
        while (
            last < len(any_allowed)
            and last - row < most
            and any_allowed[last] == any_allowed[row]
            and full[last] == full[row]
        ):
            last += 1
        yield (row * tile, min(last * tile, size.L)), columns, partial
        row = last


def _runs(flags: Sequence[bool], S: int) -> tuple[Range, ...]:
    """Return runs of True, one element per tile, as ranges of keys."""
    runs: list[Range] = []
    for at, flag in enumerate(flags):
        if flag:
            start, stop = at * _TILE, min((at + 1) * _TILE, S)
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
    return tuple(runs)


def _steps(length: int, step: int) -> Iterator[Range]:
    return ((at, min(at + step, length)) for at in range(0, length, step))


def _heads(size: Sizes, per_head: int) -> Iterator[Range]:
    """Yield ranges of heads that fit a block: whole groups, or parts of one group."""
    repeats = size.H // size.G
    fit = max(_BLOCK_SIZE // per_head, 1)
    if fit >= repeats:
        return _steps(size.H, fit // repeats * repeats)
    while repeats % fit:
        fit -= 1
    return _steps(size.H, fit)
