"""The gradients of what is added to the scores: sums of their gradients over what shares a number.

A program sums up tiles of one size, in a fixed order, and writes the sum once. For a bias that depends on the distance
alone these are the tiles of a diagonal, which hold the same distances in the same places: memory linear in length.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.additive_score import products
from regard.backends.triton.backward_kernels import slopes
from regard.backends.triton.dropout import streams
from regard.backends.triton.score import rows, times


class Over(IntEnum):
    """What a program sums over: batch rows and heads, queries, keys, or the tiles of a diagonal."""

    HEADS = 0
    QUERIES = 1
    KEYS = 2
    DIAGONALS = 3


class Sums(NamedTuple):
    """Where the sums go, and what they are taken over."""

    pointer: Any  # (b, h, L, S), (B, H, S), (B, H, L) or (H, diagonals, queries, keys), by what is summed over
    kinds: Any  # (B|1, R, C) as `mask.kinds` gives them; None without a mask
    b: Any  # 1 where each batch row has its own kinds
    rows: Any  # of tiles
    columns: Any
    batch: Any  # rows, and heads, that a program sums over
    heads: Any


@triton.jit
def gather(q, k, v, dout, sums, kept, call, over: tl.constexpr):
    """Sum the gradients of scores over what shares a number."""
    first = tl.program_id(0)
    second = tl.program_id(1)
    if over == 0:
        count = sums.batch * sums.heads
        b0 = second // (call.sizes.H // sums.heads) * sums.batch
        h0 = second % (call.sizes.H // sums.heads) * sums.heads
    elif over == 3:
        count = sums.batch * sums.rows
        b0 = 0
        h0 = second
    else:
        count = sums.rows if over == 1 else sums.columns
        b0 = second // call.sizes.H
        h0 = second % call.sizes.H
    total = tl.zeros([call.form.queries, call.form.keys], tl.float32)
    for n in range(count):
        b = b0
        head = h0
        if over == 0:
            b += n // sums.heads
            head += n % sums.heads
            row = first // sums.columns
            column = first % sums.columns
        elif over == 1:
            row = n
            column = first
        elif over == 2:
            row = first
            column = n
        else:
            b += n // sums.rows
            row = n % sums.rows
            column = row - (first - sums.columns + 1)
        some = (column >= 0) & (column < sums.columns)
        if sums.kinds is not None:
            at = (b * sums.b * sums.rows + row) * sums.columns + column
            some = some & (tl.load(sums.kinds + at, mask=some, other=2) < 2)
        if some:
            g = head // (call.sizes.H // call.sizes.G)
            query = row * call.form.queries + tl.arange(0, call.form.queries)
            key = column * call.form.keys + tl.arange(0, call.form.keys)
            heads = head + 0 * query
            shared = g + 0 * key
            own = rows(q, b, heads, query, call.sizes.L, call.form.D, call.form.wide_d, True)
            pull = rows(dout, b, heads, query, call.sizes.L, call.form.E, call.form.wide_e, True)
            other = rows(k, b, shared, key, call.sizes.S, call.form.D, call.form.wide_d, True)
            value = rows(v, b, shared, key, call.sizes.S, call.form.E, call.form.wide_e, True)
            stream, factor = streams(call, b, head, query[:, None])
            product = products(own, other, call, b, head, query, key)
            dp = times(pull, tl.trans(value), call)
            _, ds, _ = slopes(
                product, dp, kept, call, b, g, head, query[:, None], key[None, :], stream, factor, True, True
            )
            total += ds
    query = tl.arange(0, call.form.queries)
    key = tl.arange(0, call.form.keys)
    if over == 0:
        query += first // sums.columns * call.form.queries
        key += first % sums.columns * call.form.keys
        at = (second.to(tl.int64) * call.sizes.L + query[:, None]) * call.sizes.S + key[None, :]
        tl.store(sums.pointer + at, total, mask=(query < call.sizes.L)[:, None] & (key < call.sizes.S)[None, :])
    elif over == 1:
        key += first * call.form.keys
        tl.store(sums.pointer + second.to(tl.int64) * call.sizes.S + key, tl.sum(total, 0), mask=key < call.sizes.S)
    elif over == 2:
        query += first * call.form.queries
        tl.store(sums.pointer + second.to(tl.int64) * call.sizes.L + query, tl.sum(total, 1), mask=query < call.sizes.L)
    else:
        at = (second * tl.num_programs(0) + first).to(tl.int64) * call.form.queries + query[:, None]
        tl.store(sums.pointer + at * call.form.keys + key[None, :], total)


def unfold(diagonals: Tensor, S: int) -> Tensor:
    """From the sums of the diagonals of tiles (H, diagonals, T, T) to the sums by distance, query - key + S - 1, (H, n)."""
    H, count, T, _ = diagonals.shape
    # Each row one place further to the right than the one above: then a column holds one distance.
    slanted = torch.nn.functional.pad(diagonals.flip(-1), (0, T)).flatten(2)[..., : T * (2 * T - 1)]
    slanted = slanted.view(H, count, T, 2 * T - 1).sum(2)
    halves = torch.nn.functional.pad(slanted, (0, 1)).view(H, count, 2, T)
    table = diagonals.new_zeros(H, count + 1, T)
    table[:, :-1] += halves[:, :, 0]
    table[:, 1:] += halves[:, :, 1]
    return table.flatten(1)[:, -S % T :]
