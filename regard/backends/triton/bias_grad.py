"""Gradients of biases: sums of score gradients over all pairs that share an element of the bias.

Each program sums tiles in a fixed order and writes the sum once. For a bias of query - key these are the tiles of one
diagonal, which hold the same distances at the same positions: memory linear in length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.additive_score import raw_scores
from regard.backends.triton.backward_kernels import score_grads
from regard.backends.triton.dropout import dropout_streams
from regard.backends.triton.mask import EMPTY
from regard.backends.triton.score import load_rows, matmul

# What a program sums over: batch rows and heads, queries, keys, or the tiles of a diagonal.
OVER_HEADS: tl.constexpr = tl.constexpr(0)
OVER_QUERIES: tl.constexpr = tl.constexpr(1)
OVER_KEYS: tl.constexpr = tl.constexpr(2)
OVER_DIAGONAL: tl.constexpr = tl.constexpr(3)


class BiasGrad(NamedTuple):
    """The destination of the sums, and what they are taken over."""

    # Over heads (b, h, L, S), queries (B, H, S), keys (B, H, L), or diagonals (H, diagonals, queries, keys).
    pointer: Any
    tile_kinds: Any  # (B|1, R, C), from `classify_tiles`; None without a mask
    batch_stride: Any  # 1 if each batch row has tile kinds of its own, else 0
    rows: Any  # of tiles
    columns: Any
    batch: Any  # batch rows per program
    heads: Any  # heads per program


@triton.jit
def bias_grad_kernel(q, k, v, dout, bias_grad, saved, args, over: tl.constexpr):
    """Sum the gradients of scores over the pairs that share an element of the bias."""
    first = tl.program_id(0)
    second = tl.program_id(1)
    if over == OVER_HEADS:
        count = bias_grad.batch * bias_grad.heads
        b0 = second // (args.sizes.H // bias_grad.heads) * bias_grad.batch
        h0 = second % (args.sizes.H // bias_grad.heads) * bias_grad.heads
    elif over == OVER_DIAGONAL:
        count = bias_grad.batch * bias_grad.rows
        b0 = 0
        h0 = second
    else:
        count = bias_grad.rows if over == OVER_QUERIES else bias_grad.columns
        b0 = second // args.sizes.H
        h0 = second % args.sizes.H
    total = tl.zeros([args.config.queries, args.config.keys], tl.float32)
    for n in range(count):
        b = b0
        head = h0
        if over == OVER_HEADS:
            b += n // bias_grad.heads
            head += n % bias_grad.heads
            row = first // bias_grad.columns
            column = first % bias_grad.columns
        elif over == OVER_QUERIES:
            row = n
            column = first
        elif over == OVER_KEYS:
            row = first
            column = n
        else:
            b += n // bias_grad.rows
            row = n % bias_grad.rows
            column = row - (first - bias_grad.columns + 1)
        is_visited = (column >= 0) & (column < bias_grad.columns)
        if bias_grad.tile_kinds is not None:
            at = (b * bias_grad.batch_stride * bias_grad.rows + row) * bias_grad.columns + column
            is_visited = is_visited & (tl.load(bias_grad.tile_kinds + at, mask=is_visited, other=EMPTY) < EMPTY)
        if is_visited:
            g = head // (args.sizes.H // args.sizes.G)
            query = row * args.config.queries + tl.arange(0, args.config.queries)
            key = column * args.config.keys + tl.arange(0, args.config.keys)
            q_head = head + 0 * query
            kv_head = g + 0 * key
            q_tile = load_rows(q, b, q_head, query, args.sizes.L, args.config.D, args.config.D_padded, True)
            dout_tile = load_rows(dout, b, q_head, query, args.sizes.L, args.config.E, args.config.E_padded, True)
            k_tile = load_rows(k, b, kv_head, key, args.sizes.S, args.config.D, args.config.D_padded, True)
            v_tile = load_rows(v, b, kv_head, key, args.sizes.S, args.config.E, args.config.E_padded, True)
            stream, factor = dropout_streams(args, b, head, query[:, None])
            raw = raw_scores(q_tile, k_tile, args, b, head, query, key)
            dp = matmul(dout_tile, tl.trans(v_tile), args)
            _, ds, _ = score_grads(
                raw, dp, saved, args, b, g, head, query[:, None], key[None, :], stream, factor, True, True
            )
            total += ds
    query = tl.arange(0, args.config.queries)
    key = tl.arange(0, args.config.keys)
    if over == OVER_HEADS:
        query += first // bias_grad.columns * args.config.queries
        key += first % bias_grad.columns * args.config.keys
        at = (second.to(tl.int64) * args.sizes.L + query[:, None]) * args.sizes.S + key[None, :]
        tl.store(bias_grad.pointer + at, total, mask=(query < args.sizes.L)[:, None] & (key < args.sizes.S)[None, :])
    elif over == OVER_QUERIES:
        key += first * args.config.keys
        at = second.to(tl.int64) * args.sizes.S + key
        tl.store(bias_grad.pointer + at, tl.sum(total, 0), mask=key < args.sizes.S)
    elif over == OVER_KEYS:
        query += first * args.config.queries
        at = second.to(tl.int64) * args.sizes.L + query
        tl.store(bias_grad.pointer + at, tl.sum(total, 1), mask=query < args.sizes.L)
    else:
        at = (second * tl.num_programs(0) + first).to(tl.int64) * args.config.queries + query[:, None]
        tl.store(bias_grad.pointer + at * args.config.keys + key[None, :], total)


def sum_by_distance(diagonals: Tensor, S: int) -> Tensor:
    """Convert sums over diagonals of T x T tiles (H, diagonals, T, T) into sums by distance (H, n).

    Element query - key + S - 1 holds the sum of the pairs at that distance.

    >>> from regard.backends.triton.bias_grad import sum_by_distance
    >>> ones = torch.ones(1, 1, 2, 2)  # one tile of 2 queries and 2 keys
    >>> sum_by_distance(ones, S=2)[0, :3].tolist()
    [1.0, 2.0, 1.0]
    """
    H, count, T, _ = diagonals.shape
    # Shift each row one element further to the right than the row above: then each column holds one distance.
    slanted = torch.nn.functional.pad(diagonals.flip(-1), (0, T)).flatten(2)[..., : T * (2 * T - 1)]
    slanted = slanted.view(H, count, T, 2 * T - 1).sum(2)
    halves = torch.nn.functional.pad(slanted, (0, 1)).view(H, count, 2, T)
    table = diagonals.new_zeros(H, count + 1, T)
    table[:, :-1] += halves[:, :, 0]
    table[:, 1:] += halves[:, :, 1]
    return table.flatten(1)[:, -S % T :]
