"""The backward kernels: weights are recomputed from the scores and the saved row sums.

One kernel computes dq, the other dk and dv. Each program writes rows of its own, without atomics: results are the same
bits in every run. Dao, "FlashAttention-2" (2023), algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from regard.backends.triton.additive_score import raw_scores
from regard.backends.triton.dropout import dropout_streams, keep_mask
from regard.backends.triton.score import (
    LN2,
    any_nonfinite,
    load_rows,
    matmul,
    nth_tile,
    scores,
    tile_range,
    weights,
    write_rows,
    zero_nonfinite,
)


class Saved(NamedTuple):
    """The row sums, and delta = sum_j p_j dp_j - dlse of each row (B, H, L)."""

    row_sums: Any  # RowSums
    delta: Any


class Grads(NamedTuple):
    """Destinations of the gradients; None where one is not needed."""

    q: Any  # Matrix
    k: Any
    v: Any
    key_bias: Any  # (B, G, S)
    query_bias: Any  # (B, H, L)
    sigmoid_bias: Any  # (B, H, L)


@triton.jit
def score_grads(
    raw, dp, saved, args, b, g, head, query, key, stream, factor,
    is_partial: tl.constexpr, mask_nonfinite: tl.constexpr,
):  # fmt: skip
    """The weights of a tile after dropout, and the gradients of its scores after and before the softcap.

    With `mask_nonfinite` they are 0 for masked pairs, even in a row of NaN.
    """
    s, softcap_grad = scores(raw, args, b, g, head, query, key, is_partial)
    row = (b * args.sizes.H + head) * args.sizes.L + query
    delta = tl.load(saved.delta + row, mask=query < args.sizes.L, other=0.0)
    p = weights(s, saved.row_sums, args, b, head, query)
    p_dropped = p
    if args.score.seed is not None:
        is_kept = keep_mask(args, stream, factor, key)
        p_dropped = tl.where(is_kept, p * args.score.dropout_scale, 0.0)
        dp = tl.where(is_kept, dp * args.score.dropout_scale, 0.0)
    if args.config.is_sigmoid:
        ds = p * (1.0 - p) * dp
    else:
        ds = p * (dp - delta)
    ds_raw = ds * softcap_grad
    if mask_nonfinite:
        ds = tl.where(s == -float("inf"), 0.0, ds)
        ds_raw = tl.where(s == -float("inf"), 0.0, ds_raw)
        p_dropped = tl.where(s == -float("inf"), 0.0, p_dropped)
    return p_dropped, ds, ds_raw


@triton.jit
def bwd_dq_kernel(q, k, v, dout, grads, saved, args):
    """Compute the gradients of a tile of queries."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // args.sizes.H
    head = tl.program_id(1) % args.sizes.H
    g = head // (args.sizes.H // args.sizes.G)
    query = tile * args.config.queries + tl.arange(0, args.config.queries)
    q_head = head + 0 * query
    start, full, count = tile_range(args, b, tile, args.config.keys, False)
    q_tile = load_rows(q, b, q_head, query, args.sizes.L, args.config.D, args.config.D_padded, True)
    dout_tile = load_rows(dout, b, q_head, query, args.sizes.L, args.config.E, args.config.E_padded, True)
    dq, dbias, dsigmoid = _init_dq(args)
    dq, dbias, dsigmoid = _sum_over_keys(
        0, full, dq, dbias, dsigmoid, q_tile, dout_tile, start, k, v, saved, args, b, g, head, query, False, False
    )
    dq, dbias, dsigmoid = _sum_over_keys(
        full, count, dq, dbias, dsigmoid, q_tile, dout_tile, start, k, v, saved, args, b, g, head, query, True, False
    )
    if args.config.num_literals > 0 or args.score.bias is not None:  # noqa: SIM102, the outer test is compiled away
        if any_nonfinite(dq):
            # 0 * NaN is NaN: masked keys may have leaked. Recompute the tile with nonfinite values masked.
            dq, dbias, dsigmoid = _init_dq(args)
            dq, dbias, dsigmoid = _sum_over_keys(
                0, count, dq, dbias, dsigmoid, q_tile, dout_tile, start, k, v, saved, args, b, g, head, query,
                True, True,
            )  # fmt: skip
    row = (b * args.sizes.H + head) * args.sizes.L + query
    if grads.q is not None:
        dq = dq * (args.score.scale * LN2)
        write_rows(grads.q, b, q_head, query, args.sizes.L, args.config.D, args.config.D_padded, dq)
    if grads.query_bias is not None:
        tl.store(grads.query_bias + row, dbias, mask=query < args.sizes.L)
    if grads.sigmoid_bias is not None:
        tl.store(grads.sigmoid_bias + row, dsigmoid, mask=query < args.sizes.L)


@triton.jit
def _init_dq(args):
    dq = tl.zeros([args.config.queries, args.config.D_padded], tl.float32)
    return dq, tl.zeros([args.config.queries], tl.float32), tl.zeros([args.config.queries], tl.float32)


@triton.jit
def _sum_over_keys(
    begin, end, dq, dbias, dsigmoid, q_tile, dout_tile, start, k, v, saved, args, b, g, head, query,
    is_partial: tl.constexpr, mask_nonfinite: tl.constexpr,
):  # fmt: skip
    stream, factor = dropout_streams(args, b, head, query[:, None])
    for n in range(begin, end):
        key = nth_tile(args, start, n) * args.config.keys + tl.arange(0, args.config.keys)
        kv_head = g + 0 * key
        k_tile = load_rows(k, b, kv_head, key, args.sizes.S, args.config.D, args.config.D_padded, is_partial)
        v_tile = load_rows(v, b, kv_head, key, args.sizes.S, args.config.E, args.config.E_padded, is_partial)
        raw = raw_scores(q_tile, k_tile, args, b, head, query, key)
        if mask_nonfinite:
            # The scores of the queries that may attend to a nonfinite key are NaN already.
            k_tile = zero_nonfinite(k_tile)
        dp = matmul(dout_tile, tl.trans(v_tile), args)
        _, ds, ds_raw = score_grads(
            raw, dp, saved, args, b, g, head, query[:, None], key[None, :], stream, factor, is_partial, mask_nonfinite
        )
        dq += matmul(ds_raw.to(q_tile.dtype), k_tile, args)
        dbias += tl.sum(ds_raw, 1)
        dsigmoid += tl.sum(ds, 1)
    return dq, dbias, dsigmoid


@triton.jit
def bwd_dkv_kernel(q, k, v, dout, grads, saved, args):
    """Compute the gradients of a tile of keys and values, summed over the query heads that share them."""
    tile = tl.program_id(0)
    b = tl.program_id(1) // args.sizes.G
    g = tl.program_id(1) % args.sizes.G
    key = tile * args.config.keys + tl.arange(0, args.config.keys)
    kv_head = g + 0 * key
    start, full, count = tile_range(args, b, tile, args.config.queries, True)
    k_tile = load_rows(k, b, kv_head, key, args.sizes.S, args.config.D, args.config.D_padded, True)
    v_tile = load_rows(v, b, kv_head, key, args.sizes.S, args.config.E, args.config.E_padded, True)
    dk, dv, dbias = _init_dkv(args)
    repeats = args.sizes.H // args.sizes.G
    for r in range(repeats):
        head = g * repeats + r
        dk, dv, dbias = _sum_over_queries(
            0, full, dk, dv, dbias, k_tile, v_tile, start, q, dout, saved, args, b, g, head, key, False, False
        )
        dk, dv, dbias = _sum_over_queries(
            full, count, dk, dv, dbias, k_tile, v_tile, start, q, dout, saved, args, b, g, head, key, True, False
        )
    if args.config.num_literals > 0 or args.score.bias is not None:  # noqa: SIM102, the outer test is compiled away
        if any_nonfinite(dk) | any_nonfinite(dv):
            dk, dv, dbias = _init_dkv(args)
            for r in range(repeats):
                head = g * repeats + r
                dk, dv, dbias = _sum_over_queries(
                    0, count, dk, dv, dbias, k_tile, v_tile, start, q, dout, saved, args, b, g, head, key, True, True
                )
    if grads.k is not None:
        dk = dk * (args.score.scale * LN2)
        write_rows(grads.k, b, kv_head, key, args.sizes.S, args.config.D, args.config.D_padded, dk)
    if grads.v is not None:
        write_rows(grads.v, b, kv_head, key, args.sizes.S, args.config.E, args.config.E_padded, dv)
    if grads.key_bias is not None:
        tl.store(grads.key_bias + (b * args.sizes.G + g) * args.sizes.S + key, dbias, mask=key < args.sizes.S)


@triton.jit
def _init_dkv(args):
    dk = tl.zeros([args.config.keys, args.config.D_padded], tl.float32)
    dv = tl.zeros([args.config.keys, args.config.E_padded], tl.float32)
    return dk, dv, tl.zeros([args.config.keys], tl.float32)


@triton.jit
def _sum_over_queries(
    begin, end, dk, dv, dbias, k_tile, v_tile, start, q, dout, saved, args, b, g, head, key,
    is_partial: tl.constexpr, mask_nonfinite: tl.constexpr,
):  # fmt: skip
    for n in range(begin, end):
        query = nth_tile(args, start, n) * args.config.queries + tl.arange(0, args.config.queries)
        q_head = head + 0 * query
        q_tile = load_rows(q, b, q_head, query, args.sizes.L, args.config.D, args.config.D_padded, is_partial)
        dout_tile = load_rows(dout, b, q_head, query, args.sizes.L, args.config.E, args.config.E_padded, is_partial)
        stream, factor = dropout_streams(args, b, head, query[None, :])
        # Keys by queries: the two products below take their left operand in this layout.
        raw = matmul(k_tile, tl.trans(q_tile), args)
        if mask_nonfinite:
            # The scores of the keys that a nonfinite query may attend to are NaN already.
            q_tile = zero_nonfinite(q_tile)
        dp = matmul(v_tile, tl.trans(dout_tile), args)
        p_dropped, _, ds_raw = score_grads(
            raw, dp, saved, args, b, g, head, query[None, :], key[:, None], stream, factor, is_partial, mask_nonfinite
        )
        dv += matmul(p_dropped.to(dout_tile.dtype), dout_tile, args)
        dk += matmul(ds_raw.to(k_tile.dtype), q_tile, args)
        dbias += tl.sum(ds_raw, 1)
    return dk, dv, dbias
