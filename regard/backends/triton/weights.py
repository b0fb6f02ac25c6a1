"""Summaries that need the sum of each row first: the attention that each key receives, and rows of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from regard.backends.triton.additive_score import raw_scores
from regard.backends.triton.score import load_rows, nth_tile, scores, tile_range, weights


@triton.jit
def received_kernel(q, k, received, row_sums, args):
    """Sum the weights of a tile of keys over all queries of one head. `received` is (B, H, S)."""
    tile = tl.program_id(0)
    b = tl.program_id(1) // args.sizes.H
    head = tl.program_id(1) % args.sizes.H
    g = head // (args.sizes.H // args.sizes.G)
    key = tile * args.config.keys + tl.arange(0, args.config.keys)
    start, full, count = tile_range(args, b, tile, args.config.queries, True)
    k_tile = load_rows(k, b, g + 0 * key, key, args.sizes.S, args.config.D, args.config.D_padded, True)
    sums = tl.zeros([args.config.keys], tl.float32)
    sums = _sum_queries(0, full, sums, k_tile, start, q, row_sums, args, b, g, head, key, False)
    sums = _sum_queries(full, count, sums, k_tile, start, q, row_sums, args, b, g, head, key, True)
    tl.store(received + (b * args.sizes.H + head) * args.sizes.S + key, sums, mask=key < args.sizes.S)


@triton.jit
def _sum_queries(begin, end, sums, k_tile, start, q, row_sums, args, b, g, head, key, is_partial: tl.constexpr):
    for n in range(begin, end):
        query = nth_tile(args, start, n) * args.config.queries + tl.arange(0, args.config.queries)
        q_tile = load_rows(q, b, head + 0 * query, query, args.sizes.L, args.config.D, args.config.D_padded, is_partial)
        raw = raw_scores(q_tile, k_tile, args, b, head, query, key)
        s, _ = scores(raw, args, b, g, head, query[:, None], key[None, :], is_partial)
        p = weights(s, row_sums, args, b, head, query[:, None])
        if is_partial or args.score.bias is not None:
            p = tl.where(s == -float("inf"), 0.0, p)
        sums += tl.sum(p, 0)
    return sums


@triton.jit
def weights_kernel(q, k, out, query_indices, count, row_sums, args):
    """Write the weights (B, H, count, S) of the queries with these indices; all queries if `query_indices` is None."""
    row = tl.program_id(1) * args.config.queries + tl.arange(0, args.config.queries)
    key = tl.program_id(0) * args.config.keys + tl.arange(0, args.config.keys)
    b = tl.program_id(2) // args.sizes.H
    head = tl.program_id(2) % args.sizes.H
    g = head // (args.sizes.H // args.sizes.G)
    query = row
    if query_indices is not None:
        query = tl.load(query_indices + row, mask=row < count, other=0)
    q_tile = load_rows(q, b, head + 0 * query, query, args.sizes.L, args.config.D, args.config.D_padded, True)
    k_tile = load_rows(k, b, g + 0 * key, key, args.sizes.S, args.config.D, args.config.D_padded, True)
    raw = raw_scores(q_tile, k_tile, args, b, head, query, key)
    s, _ = scores(raw, args, b, g, head, query[:, None], key[None, :], True)
    p = weights(s, row_sums, args, b, head, query[:, None])
    p = tl.where(s == -float("inf"), 0.0, p)
    at = (tl.program_id(2).to(tl.int64) * count + row[:, None]) * args.sizes.S + key[None, :]
    tl.store(out + at, p, mask=(row < count)[:, None] & (key < args.sizes.S)[None, :])
