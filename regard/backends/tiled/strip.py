"""Strips: the pieces in which `tiled` computes a problem.

A strip is a few rows of queries and the keys that they may attend to. Which keys these are is arithmetic on the tiles
of the mask: empty tiles are left out, full ones need no mask, the rest is asked pair by pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.backends.equation import over, rows_in
from regard.components.normalizer import Softmax
from regard.components.tile import Grid, Range, Sizes, Tile
from regard.plan.problem import Plan

# Numbers a strip may hold (4 MiB of fp32): larger ones leave the caches, smaller ones pay for more calls of PyTorch.
_STRIP = 1 << 20
# Numbers a segment may hold while it is scored, where a score holds several per pair.
_SEGMENT = 1 << 22
# Rows and columns of the tiles that a mask is asked about; twice as many rows for long sequences, where calls cost more
# than the pairs that a finer grid would leave out. Columns cost no calls: neighbours are scored as one.
_TILE = 64
_LONG = 1024


@dataclass(frozen=True)
class Strip:
    """The rows of `tile`, the ranges of keys they may attend to, and which parts of these need the mask."""

    tile: Tile
    columns: tuple[Range, ...]
    partial: tuple[Range, ...]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.columns)

    def places(self, keys: Range) -> slice:
        """Where a range of keys, which lies in one of the columns, stands in the strip."""
        at = 0
        for start, stop in self.columns:
            if start <= keys[0] and keys[1] <= stop:
                return slice(at + keys[0] - start, at + keys[1] - start)
            at += stop - start
        raise AssertionError(f"keys {keys} are not in the columns {self.columns}")

    def segments(self, plan: Plan, width: int) -> list[Range]:
        """The columns, cut where the score holds too many numbers per pair; `width` is D."""
        rows = (self.tile.b[1] - self.tile.b[0]) * (self.tile.h[1] - self.tile.h[0]) * (self.tile.q[1] - self.tile.q[0])
        volume = plan.score.volume(width)
        longest = max(self.width if volume == 1 else max(_SEGMENT // max(rows * volume, 1), 16), 1)
        return [(at, min(at + longest, stop)) for start, stop in self.columns for at in range(start, stop, longest)]

    def allowed(self, plan: Plan, keys: Range) -> Tensor:
        """What the mask says of a range of keys."""
        return plan.mask.allowed(dataclasses.replace(self.tile, k=keys))  # type: ignore[union-attr]

    def queries(self, x: Tensor) -> Tensor:
        """The rows of the strip in a tensor (B, H, L, n), as a view."""
        return x[slice(*self.tile.b), slice(*self.tile.h), slice(*self.tile.q)]

    def keys(self, x: Tensor, keys: Range) -> Tensor:
        """A range of keys in a tensor (B, G, S, n), for the heads of the strip, as a view."""
        return x[slice(*self.tile.b), slice(*self.tile.g), slice(*keys)]

    def all_keys(self, x: Tensor) -> Tensor:
        """The keys of all columns in a tensor (B, G, S, n), in one piece."""
        parts = [self.keys(x, keys) for keys in self.columns]
        if not parts:
            return self.keys(x, (0, 0)).new_zeros(
                self.tile.b[1] - self.tile.b[0], self.tile.g[1] - self.tile.g[0], 1, x.shape[-1]
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def has(self, names: Sequence[str]) -> tuple[str, ...]:
        """The outputs that the strip has something to say of: without keys, there is only the log-sum-exp of a sink."""
        return tuple([name for name in names if self.columns or name == "lse"])


def place(plan: Plan, name: str, output: Tensor, strip: Strip, value: Tensor) -> None:
    """Write what a strip found into an output."""
    b, h, q = (slice(*r) for r in (strip.tile.b, strip.tile.h, strip.tile.q))
    if name not in ("received", "rows", "full"):
        output[b, h, q] = value
        return
    for keys in strip.columns:
        found, place = value[..., strip.places(keys)], slice(*keys)
        if name == "received":
            output[b, h, place] += found
        elif name == "rows":
            output[b, h, rows_in(plan, strip.tile)[0], place] = found
        else:
            output[b, h, q, place] = found


def taken(plan: Plan, name: str, gradient: Tensor, strip: Strip) -> Tensor:
    """The part of an output's gradient that belongs to a strip: the mirror of `place`."""
    b, h, q = (slice(*r) for r in (strip.tile.b, strip.tile.h, strip.tile.q))
    if name not in ("received", "rows", "full"):
        return gradient[b, h, q]
    rows: Any = q
    if name == "rows":
        rows = rows_in(plan, strip.tile)[0]
    if name == "received":
        return over(strip.columns, lambda keys: gradient[b, h, slice(*keys)])
    return over(strip.columns, lambda keys: gradient[b, h, rows, slice(*keys)])


# ---------------------------------------------------------------------------------------------------------------------
# Which strips there are.


def strips(plan: Plan, size: Sizes, device: torch.device) -> Iterator[Strip]:
    """The strips of a problem: together they hold every pair that may attend."""
    if not size.B * size.H * size.L:
        return
    for b, rows, segments in _rows(plan, size, device):
        width = sum(stop - start for start, stop in segments[0])
        # A row with a sink has a log-sum-exp even where it has no keys.
        sink = isinstance(plan.normalizer, Softmax) and plan.normalizer.sink is not None and plan.summary.lse
        if not width and not sink:
            continue
        for h in _heads(size, (b[1] - b[0]) * (rows[1] - rows[0]) * max(width, 1)):
            tile = Tile(b, h, rows, (0, size.S), size, device)
            yield Strip(tile, *segments)


def _rows(
    plan: Plan, size: Sizes, device: torch.device
) -> Iterator[tuple[Range, Range, tuple[tuple[Range, ...], tuple[Range, ...]]]]:
    """Batch rows, queries, and their columns with the partial ones among these."""
    if plan.mask is None or not size.S:
        # Long strips for short keys: as many rows as a strip may hold for one head.
        step = min(max(_STRIP // max(size.H * size.S, 1), _TILE), 4 * _TILE)
        batch = max(_STRIP // max(size.H * min(step, size.L) * size.S, 1), 1)
        columns = ((0, size.S),) if size.S else ()
        for b in _steps(size.B, batch):
            for rows in _steps(size.L, step):
                yield b, rows, (columns, ())
        return
    tile = _TILE if max(size.L, size.S) <= _LONG else 2 * _TILE
    coverage = plan.mask.coverage(Grid.of(size, tile, _TILE, device))
    shared = all(x.shape[0] == 1 for x in coverage)
    some, full = (x.expand(1 if shared else size.B, -1, -1).tolist() for x in coverage)
    for index in range(len(some)):
        batch = max(_STRIP // (size.H * min(tile, size.L) * size.S), 1) if shared else 1
        for b in _steps(size.B, batch) if shared else [(index, index + 1)]:
            for rows, some_keys, partial in _merged(some[index], full[index], tile, size):
                yield b, rows, (some_keys, partial)


def _merged(
    some: Sequence[Sequence[bool]], full: Sequence[Sequence[bool]], tile: int, size: Sizes
) -> Iterator[tuple[Range, tuple[Range, ...], tuple[Range, ...]]]:
    """Rows of tiles with their columns and the partial ones; alike neighbours are taken together while they fit."""
    row = 0
    while row < len(some):
        columns = _runs(some[row], size.S)
        partial = _runs([a and not b for a, b in zip(some[row], full[row], strict=True)], size.S)
        width = sum(stop - start for start, stop in columns)
        most = max(_STRIP // (size.H * max(width, 1) * tile), 1)
        last = row + 1
        while last < len(some) and last - row < most and some[last] == some[row] and full[last] == full[row]:
            last += 1
        yield (row * tile, min(last * tile, size.L)), columns, partial
        row = last


def _runs(flags: Sequence[bool], S: int) -> tuple[Range, ...]:
    """Runs of tiles that are flagged, as ranges of keys."""
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
    """Ranges of heads that fit a strip: whole groups, or parts of one group."""
    repeats = size.H // size.G
    fit = max(_STRIP // per_head, 1)
    if fit >= repeats:
        return _steps(size.H, fit // repeats * repeats)
    while repeats % fit:
        fit -= 1
    return _steps(size.H, fit)
