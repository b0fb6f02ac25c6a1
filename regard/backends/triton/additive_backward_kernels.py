"""The gradients of additive scores on the GPU.

    d/dx tanh(x) = 4 f (1 - f), f = 1 / (1 + e^2x)        dq_d = w_d sum_j ds_j tanh'        dw_d = sum_ij ds tanh

The gradients ds of the scores are written for a strip of queries at a time: memory linear in length. From there, a program
keeps the rows that are its own in registers, and lets those of the other side go by one after another: no sum crosses
threads. Two fractions share a division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.additive_score import TWICE, reach, sums
from regard.backends.triton.backward_kernels import Kept, slopes
from regard.backends.triton.call import Call, matrix, start
from regard.backends.triton.dropout import streams
from regard.backends.triton.score import listed, reciprocal, rows, span, tanh, times


class Strip(NamedTuple):
    """The gradients of scores and the weights, of some rows of queries."""

    by_query: Any  # (B, H, rows, S)
    by_key: Any  # (B, H, S, rows)
    seen: Any  # (B, H, rows, S): the weights as the values see them
    kinds: Any  # of all tiles (B|1, R, C), as `mask.kinds` gives them; None without a mask
    b: Any  # 1 where each batch row has its own kinds
    first: Any  # the first tile of queries
    rows: Any


class Side(NamedTuple):
    """Queries or keys (B, heads, rows, D): e^2x and x itself; and how far each tile reaches (B, heads, tiles)."""

    power: Any
    angle: Any
    reach: Any
    heads: Any
    rows: Any
    tiles: Any


@triton.jit
def write_slopes(v, dout, strip, kept, call):
    """Write the gradients of the scores of a strip."""
    tile_k = tl.program_id(0)
    place = tl.program_id(1)
    tile_q = strip.first + place
    b = tl.program_id(2) // call.sizes.H
    head = tl.program_id(2) % call.sizes.H
    g = head // (call.sizes.H // call.sizes.G)
    some = tile_q * call.form.queries < call.sizes.L
    if strip.kinds is not None:
        at = (b * strip.b * tl.cdiv(call.sizes.L, call.form.queries) + tile_q) * tl.num_programs(0) + tile_k
        some = some & (tl.load(strip.kinds + at, mask=some, other=2) < 2)
    if some:
        query = tile_q * call.form.queries + tl.arange(0, call.form.queries)
        key = tile_k * call.form.keys + tl.arange(0, call.form.keys)
        pull = rows(dout, b, head + 0 * query, query, call.sizes.L, call.form.E, call.form.wide_e, True)
        value = rows(v, b, g + 0 * key, key, call.sizes.S, call.form.E, call.form.wide_e, True)
        stream, factor = streams(call, b, head, query[:, None])
        product = sums(call, b, head, query, key)
        dp = times(pull, tl.trans(value), call)
        seen, _, before = slopes(
            product, dp, kept, call, b, g, head, query[:, None], key[None, :], stream, factor, True, True
        )
        row = (place * call.form.queries + tl.arange(0, call.form.queries))[:, None]
        column = key[None, :]
        inside = (query < call.sizes.L)[:, None] & (column < call.sizes.S)
        base = tl.program_id(2).to(tl.int64) * strip.rows * call.sizes.S
        by_query = base + row.to(tl.int64) * call.sizes.S + column
        tl.store(strip.by_query + by_query, before, mask=inside)
        tl.store(strip.seen + by_query, seen.to(strip.seen.dtype.element_ty), mask=inside)
        tl.store(strip.by_key + base + column.to(tl.int64) * strip.rows + row, before, mask=inside)


@triton.jit
def pull_rows(own, other, slope, dx, dweight, strip, call, of_keys: tl.constexpr):
    """Add to the gradients of some rows of queries, of one head, or of keys, over the heads that share them.

    `slope` is the strip with the rows of `own` innermost. `dweight` (B, H, tiles, D) gets the sums of ds tanh, if not None.
    """
    count: tl.constexpr = call.form.keys if of_keys else call.form.queries
    across: tl.constexpr = call.form.queries if of_keys else call.form.keys
    tile = tl.program_id(0)
    if not of_keys:
        tile += strip.first
    b = tl.program_id(1) // own.heads
    h = tl.program_id(1) % own.heads
    row = tile * count + tl.arange(0, count)
    column = tl.arange(0, call.form.wide_d)
    within = (column < call.form.D)[None, :]
    at = ((b * own.heads + h).to(tl.int64) * own.rows + row[:, None]) * call.form.D + column[None, :]
    place = (row < own.rows)[:, None] & within
    power = tl.load(own.power + at, mask=place, other=0.0)
    angle = tl.load(own.angle + at, mask=place, other=0.0)
    reach = tl.load(own.reach + (b * own.heads + h) * own.tiles + tile)
    total = tl.zeros([count, call.form.wide_d], tl.float32)
    start, _, end = span(call, b, tile, across, of_keys)
    repeats = call.sizes.H // own.heads
    strip_tiles = strip.rows // call.form.queries
    for r in range(repeats):
        head = h * repeats + r
        shared = head // (call.sizes.H // other.heads)
        weight = tl.load(
            call.words.turned.weight + head * call.words.turned.head * call.form.D + column,
            mask=column < call.form.D,
            other=0.0,
        )
        rise = tl.zeros([count, call.form.wide_d], tl.float32)
        value = tl.zeros([count, call.form.wide_d], tl.float32)
        of_head = (b * call.sizes.H + head).to(tl.int64) * strip.rows * call.sizes.S
        for n in range(end):
            tile_too = listed(call, start, n)
            if of_keys:
                some = (tile_too >= strip.first) & (tile_too < strip.first + strip_tiles)
                first = tile_too * across - strip.first * call.form.queries
                line = own.rows
                mine = row
                length = call.sizes.L
            else:
                some = True
                first = tile_too * across
                line = strip.rows
                mine = row - strip.first * call.form.queries
                length = call.sizes.S
            if some:
                far = reach + tl.load(other.reach + (b * other.heads + shared) * other.tiles + tile_too)
                base = (b * other.heads + shared).to(tl.int64) * other.rows
                for m in range(0, across, 2):
                    one = tile_too * across + m
                    two = one + 1
                    from_one = slope + of_head + (first + m).to(tl.int64) * line + mine
                    h_one = tl.load(from_one, mask=(row < own.rows) & (one + 0 * row < length), other=0.0)[:, None]
                    h_two = tl.load(from_one + line, mask=(row < own.rows) & (two + 0 * row < length), other=0.0)[
                        :, None
                    ]
                    at_one = (base + one) * call.form.D + column
                    mask_one = (column < call.form.D) & (one + 0 * column < length)
                    mask_two = (column < call.form.D) & (two + 0 * column < length)
                    if far == float("inf"):
                        x, rise_x = tanh(angle + tl.load(other.angle + at_one, mask=mask_one, other=0.0)[None, :], call)
                        y, rise_y = tanh(
                            angle + tl.load(other.angle + at_one + call.form.D, mask=mask_two, other=0.0)[None, :], call
                        )
                        rise += 0.25 * (h_one * rise_x + h_two * rise_y)
                        value += 0.5 * (h_one * x + h_two * y)
                    else:
                        t = 1.0 + power * tl.load(other.power + at_one, mask=mask_one, other=0.0)[None, :]
                        u = 1.0 + power * tl.load(other.power + at_one + call.form.D, mask=mask_two, other=0.0)[None, :]
                        if far < 60.0:
                            both = reciprocal(t * u, call)
                            x = both * u
                            y = both * t
                        else:
                            x = 1.0 / t
                            y = 1.0 / u
                        rise += h_one * (x - x * x) + h_two * (y - y * y)
                        value += h_one * (0.5 - x) + h_two * (0.5 - y)
        total += rise * (4.0 * weight)[None, :]
        if dweight is not None:
            at_weight = ((b * call.sizes.H + head).to(tl.int64) * own.tiles + tile) * call.form.D + column
            tl.store(dweight + at_weight, tl.sum(value, 0) * 2.0, mask=column < call.form.D)
    tl.store(dx + at, tl.load(dx + at, mask=place, other=0.0) + total, mask=place)


# Numbers that a strip may hold: enough rows to fill the GPU, and no more memory than a few tensors take.
_STRIP = 1 << 25


def pull(call: Call, dout: Tensor, kept: Kept, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """The gradients of q, k, v and the weights of an additive score, by the places of the tensors."""
    size, shape, tensors = call.size, call.shape, call.tensors
    B, H, G, S = size.B, size.H, size.G, size.S
    place = call.plan.score.v.index  # type: ignore[attr-defined]
    tiles_q, tiles_k = call.grid
    together = min(max(_STRIP // (B * H * S * shape.queries), 1), tiles_q)
    count = together * shape.queries
    ds = call.empty(2, B, H, count * S)
    seen = call.v.new_empty((B, G, H // G, count, S))
    kinds, own = call.kinds()
    sides = []
    for x, heads, of_tile, tiles in ((call.q, H, shape.queries, tiles_q), (call.k, G, shape.keys, tiles_k)):
        angle = x.float().contiguous()
        sides.append(
            Side(
                torch.exp2(angle * TWICE),
                angle,
                reach(torch.nn.functional.pad(angle.mT, (0, -x.shape[2] % of_tile)), of_tile),
                heads,
                x.shape[2],
                tiles,
            )
        )
    queries, keys = sides
    dq, dk = (torch.zeros_like(side.angle) for side in sides)
    dv = dq.new_zeros(B, G, S, call.E)
    dweight = dq.new_zeros(B, H, tiles_q, call.D) if wanted[place] else None
    across, down = call.told(), call.told(turned=True)
    for first in range(0, tiles_q, together):
        strip = Strip(ds[0], ds[1], seen, kinds, own, first, count)
        seen.zero_()  # tiles that hold nothing are not visited
        start(write_slopes, (tiles_k, together, B * H), shape, matrix(call.v), matrix(dout), strip, kept, across)
        if wanted[0] or dweight is not None:
            grid = (min(together, tiles_q - first), B * H)
            start(pull_rows, grid, shape, queries, keys, ds[1], dq, dweight, strip, across, False)
        if wanted[1]:
            start(pull_rows, (tiles_k, B * G), shape, keys, queries, ds[0], dk, None, strip, down, True)
        if wanted[2]:
            some = dout[:, :, first * shape.queries : first * shape.queries + count].unflatten(1, (G, -1))
            dv += torch.einsum("bgrls,bgrle->bgse", seen[:, :, :, : some.shape[3]].float(), some.float())
    found = {index: x for index, x in enumerate((dq, dk, dv)) if wanted[index]}
    if dweight is not None:
        found[place] = dweight.sum((0, 2)) if tensors[place].dim() == 2 else dweight.sum((0, 1, 2))
    return found
