"""The equation in strips of plain PyTorch: any device, any score, memory linear in length, forward and backward.

A strip is a few rows of queries and the keys that they may attend to; tiles of the mask that are empty are left out.
Rows are whole, so any normalizer and any summary is taken in one pass, and the backward pass is the forward pass of a
strip, done again with a graph. Two levels keep that graph small: one from the scores of the strip to the outputs, and one
per segment of keys from q, k and the words to the scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.kernels.equation import can_be_empty, finish, over, poison, rows_in, scores
from regard.normalizer import Softmax
from regard.position import Added
from regard.problem import Plan, sizes
from regard.score import Python, widen
from regard.tile import Grid, Range, Sizes, Tile
from regard.word import fill, slots

# Numbers a strip may hold (8 MiB of fp32): larger ones leave the caches, smaller ones pay for more calls of PyTorch.
_STRIP = 1 << 21
# Numbers a segment may hold while it is scored, where a score holds several per pair.
_SEGMENT = 1 << 22
# Rows and columns of the tiles that a mask is asked about; twice as many for long sequences, where calls cost more than
# the pairs that a finer grid would leave out.
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


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """It serves everything."""
    return None


def forward(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`."""
    names = plan.outputs
    plan = fill(plan, tensors)
    q, k, v = (widen(x.detach()) for x in tensors[:3])
    size = sizes(q, k)
    outputs = empty_outputs(plan, names, size, q, v, tensors[2].dtype)
    with torch.no_grad(), _in_full_precision(q):
        for strip in _strips(plan, size, q, v):
            s = _scores(plan, q, k, strip)
            values = finish(plan, s, _cut_keys(v, strip), strip.tile, strip.columns, names, _empty_rows(plan, s, strip))
            for name, output, value in zip(names, outputs, values, strict=True):
                _place(plan, name, output, strip, value)
    return tuple(outputs)


def backward(
    plan: Plan, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that are `wanted`, from those of the outputs (None = zero)."""
    given = {name: g for name, g in zip(plan.outputs, gradients, strict=True) if g is not None and name != "top_keys"}
    q, k, v = (widen(x.detach()) for x in tensors[:3])
    totals = [
        torch.zeros_like(widen(x.detach()), memory_format=torch.contiguous_format) if want else None
        for x, want in zip(tensors, wanted, strict=True)
    ]
    leaves = _leaves(plan, tensors, wanted)
    with_leaves = fill(plan, leaves)
    from_scores = [i for i in slots((plan.score, plan.bias)) if wanted[i] and not _is_added(plan, i)]
    from_weights = [i for i in slots(plan.normalizer) if wanted[i]]
    size = sizes(q, k)
    with torch.no_grad(), _in_full_precision(q):
        for strip in _strips(with_leaves, size, q, v):
            s = _scores(with_leaves, q, k, strip).detach().requires_grad_()
            values = _cut_keys(v, strip).detach().requires_grad_()
            with torch.enable_grad():
                empty = _empty_rows(with_leaves, s.detach(), strip)
                outputs = finish(with_leaves, s, values, strip.tile, strip.columns, tuple(given), empty)
            pairs = [
                (out, _taken(plan, name, given[name], strip).to(out.dtype))
                for name, out in zip(given, outputs, strict=True)
                if out.requires_grad
            ]
            if not pairs:
                continue
            inputs = [s, values, *(leaves[i] for i in from_weights)]
            ds, dv, *dparameters = _gradients(pairs, inputs)
            for i, gradient in zip(from_weights, dparameters, strict=True):
                _add(totals[i], gradient)
            if totals[2] is not None and dv is not None:
                for keys in strip.columns:
                    _at(totals[2], strip.tile.b, strip.tile.g, keys).add_(dv[:, :, strip.places(keys)])
            if ds is not None:
                # Pairs that may not attend have no gradient, whatever NaN stands in the row.
                for keys in strip.partial:
                    ds[..., strip.places(keys)].masked_fill_(~_allowed(with_leaves, strip, keys), 0.0)
                _from_scores(plan, with_leaves, q, k, strip, ds, leaves, from_scores, totals)
    return tuple(
        None if total is None else total.to(x.dtype) for total, x in zip(totals, tensors, strict=True)
    )


def _from_scores(
    plan: Plan, with_leaves: Plan, q: Tensor, k: Tensor, strip: Strip, ds: Tensor, leaves: Sequence[Tensor],
    parameters: Sequence[int], totals: Sequence[Tensor | None],
) -> None:
    """From the gradient of a strip's scores to those of q, k and what the score and the bias hold."""
    tile = strip.tile
    added = plan.bias.tensor.index if isinstance(plan.bias, Added) else None  # type: ignore[attr-defined]
    for keys in _segments(strip, with_leaves, q.shape[-1]):
        part = dataclasses.replace(tile, k=keys)
        gradient = ds[..., strip.places(keys)]
        if added is not None and totals[added] is not None:
            place = part.cut(totals[added])
            place.add_(gradient.sum_to_size(place.shape))
        some_q = _at(q, tile.b, tile.h, tile.q).detach().requires_grad_()
        some_k = _at(k, tile.b, tile.g, keys).detach().requires_grad_()
        with torch.enable_grad():
            s = scores(with_leaves, some_q, some_k, part)
        if not s.requires_grad:
            continue
        dq, dk, *dparameters = _gradients([(s, gradient)], [some_q, some_k, *(leaves[i] for i in parameters)])
        if totals[0] is not None and dq is not None:
            _at(totals[0], tile.b, tile.h, tile.q).add_(dq)
        if totals[1] is not None and dk is not None:
            _at(totals[1], tile.b, tile.g, keys).add_(dk)
        for i, parameter in zip(parameters, dparameters, strict=True):
            _add(totals[i], parameter)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # What a user's score computes once, outside, from its parameters belongs to every segment's graph: it must stay.
    return torch.autograd.grad([p[0] for p in pairs], inputs, [p[1] for p in pairs], allow_unused=True, retain_graph=True)


def _leaves(plan: Plan, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The tensors of the words, each the leaf of a graph of its own if its gradient is wanted."""
    # A Python function holds its own tensors: those themselves are the leaves.
    own = slots(plan.score.captured) if isinstance(plan.score, Python) else []
    return [
        x if i in own else x.detach().requires_grad_() if want and i > 2 and not _is_added(plan, i) else x.detach()
        for i, (x, want) in enumerate(zip(tensors, wanted, strict=True))
    ]


def _is_added(plan: Plan, slot: int) -> bool:
    """Is it a tensor added to the scores? It may be as large as they are, so its gradient is summed up in place."""
    return isinstance(plan.bias, Added) and plan.bias.tensor.index == slot  # type: ignore[attr-defined]


def empty_outputs(plan: Plan, names: Sequence[str], size: Sizes, q: Tensor, v: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The outputs of a problem in which nobody may attend to anything: what strips do not reach."""
    B, H, L, S = size.B, size.H, size.L, size.S
    summary = plan.summary
    shapes = {
        "out": (B, H, L, v.shape[-1]),
        "received": (B, H, S),
        "full": (B, H, L, S),
        "rows": (B, H, len(summary.row_numbers), S),
        "top_weights": (B, H, L, summary.top),
        "mass": (B, H, L, 0 if summary.mass is None else summary.mass.shape[-2]),
    }
    outputs = []
    for name in names:
        if name == "top_keys":
            outputs.append(q.new_full((B, H, L, summary.top), -1, dtype=torch.int64))
        elif name == "lse":
            outputs.append(q.new_full((B, H, L), -math.inf))
        else:
            outputs.append(q.new_zeros(shapes.get(name, (B, H, L)), dtype=dtype if name == "out" else q.dtype))
    return outputs


# ---------------------------------------------------------------------------------------------------------------------
# One strip.


def _scores(plan: Plan, q: Tensor, k: Tensor, strip: Strip) -> Tensor:
    tile = strip.tile
    some_q = _at(q, tile.b, tile.h, tile.q)

    def segment(keys: Range) -> Tensor:
        part = dataclasses.replace(tile, k=keys)
        return poison(plan, scores(plan, some_q, _at(k, tile.b, tile.g, keys), part), part)

    if not strip.columns:
        return some_q.new_full((*some_q.shape[:3], 1), -math.inf)
    with torch.no_grad():
        s = over(_segments(strip, plan, q.shape[-1]), segment)
        for keys in strip.partial:
            s[..., strip.places(keys)].masked_fill_(~_allowed(plan, strip, keys), -math.inf)
    return s


def _segments(strip: Strip, plan: Plan, width: int) -> list[Range]:
    """The columns of a strip, cut where the score holds too many numbers per pair."""
    tile = strip.tile
    rows = (tile.b[1] - tile.b[0]) * (tile.h[1] - tile.h[0]) * (tile.q[1] - tile.q[0])
    volume = plan.score.volume(width)
    longest = strip.width if volume == 1 else max(_SEGMENT // max(rows * volume, 1), 16)
    return [
        (at, min(at + longest, stop)) for start, stop in strip.columns for at in range(start, stop, max(longest, 1))
    ]


def _allowed(plan: Plan, strip: Strip, keys: Range) -> Tensor:
    return plan.mask.allowed(dataclasses.replace(strip.tile, k=keys))  # type: ignore[union-attr]


def _empty_rows(plan: Plan, s: Tensor, strip: Strip) -> Tensor | None:
    if strip.columns and not strip.partial and not can_be_empty(dataclasses.replace(plan, mask=None)):
        return None
    empty = s.amax(-1, keepdim=True) == -math.inf
    return empty if bool(empty.any()) else None


def _at(x: Tensor, b: Range, h: Range, n: Range) -> Tensor:
    return x[slice(*b), slice(*h), slice(*n)]


def _cut_keys(x: Tensor, strip: Strip) -> Tensor:
    """The keys (or values) of a strip's columns, in one piece."""
    parts = [_at(x, strip.tile.b, strip.tile.g, keys) for keys in strip.columns]
    if not parts:
        return x.new_zeros(strip.tile.b[1] - strip.tile.b[0], strip.tile.g[1] - strip.tile.g[0], 1, x.shape[-1])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _place(plan: Plan, name: str, output: Tensor, strip: Strip, value: Tensor) -> None:
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


def _taken(plan: Plan, name: str, gradient: Tensor, strip: Strip) -> Tensor:
    """The part of an output's gradient that belongs to a strip: the mirror of `_place`."""
    b, h, q = (slice(*r) for r in (strip.tile.b, strip.tile.h, strip.tile.q))
    if name not in ("received", "rows", "full"):
        return gradient[b, h, q]
    rows: Any = q
    if name == "rows":
        rows = rows_in(plan, strip.tile)[0]
    if not strip.columns:
        like = gradient[b, h, :1] if name == "received" else gradient[b, h, rows, :1]
        return torch.zeros_like(like) if gradient.shape[-1] else like.new_zeros(*like.shape[:-1], 1)
    if name == "received":
        return over(strip.columns, lambda keys: gradient[b, h, slice(*keys)])
    return over(strip.columns, lambda keys: gradient[b, h, rows, slice(*keys)])


def _add(total: Tensor | None, gradient: Tensor | None) -> None:
    if total is not None and gradient is not None:
        total.add_(gradient)


def _in_full_precision(x: Tensor) -> Any:
    """Autocast has chosen the precision of q, k and v; sums are kept in float32."""
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# Which strips there are.


def _strips(plan: Plan, size: Sizes, q: Tensor, v: Tensor) -> Iterator[Strip]:
    """The strips of a problem: together they hold every pair that may attend."""
    if not size.B * size.H * size.L:
        return
    for b, rows, segments in _rows(plan, size, q.device):
        width = sum(stop - start for start, stop in segments[0])
        # A row with a sink has a log-sum-exp even where it has no keys.
        sink = isinstance(plan.normalizer, Softmax) and plan.normalizer.sink is not None and plan.summary.lse
        if not width and not sink:
            continue
        for h in _heads(size, (b[1] - b[0]) * (rows[1] - rows[0]) * max(width, 1)):
            tile = Tile(b, h, rows, (0, size.S), size, q.device)
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
    some, full = plan.mask.coverage(Grid.of(size, tile, tile, device))
    shared = some.shape[0] == 1 and full.shape[0] == 1
    some, full = (x.expand(1 if shared else size.B, -1, -1).tolist() for x in (some, full))
    for index in range(len(some)):
        batch = max(_STRIP // (size.H * min(tile, size.L) * size.S), 1) if shared else 1
        for b in _steps(size.B, batch) if shared else [(index, index + 1)]:
            for rows, columns, partial in _merged(some[index], full[index], tile, size):
                yield b, rows, (columns, partial)


def _merged(
    some: Sequence[Sequence[bool]], full: Sequence[Sequence[bool]], tile: int, size: Sizes
) -> Iterator[tuple[Range, tuple[Range, ...], tuple[Range, ...]]]:
    """Rows of tiles with their columns and the partial ones; neighbours with the same are taken together while they fit."""
    row = 0
    while row < len(some):
        columns = _runs(some[row], tile, size.S)
        partial = _runs([a and not b for a, b in zip(some[row], full[row], strict=True)], tile, size.S)
        width = sum(stop - start for start, stop in columns)
        most = max(_STRIP // (size.H * max(width, 1) * tile), 1)
        last = row + 1
        while last < len(some) and last - row < most and some[last] == some[row] and full[last] == full[row]:
            last += 1
        yield (row * tile, min(last * tile, size.L)), columns, partial
        row = last


def _runs(flags: Sequence[bool], tile: int, S: int) -> tuple[Range, ...]:
    """Runs of tiles that are flagged, as ranges of keys."""
    runs: list[Range] = []
    for at, flag in enumerate(flags):
        if flag:
            start, stop = at * tile, min((at + 1) * tile, S)
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


