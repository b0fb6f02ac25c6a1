"""The forward kernel: scores, weights, output and summaries of one tile of queries at a time.

The kernel iterates over tiles of keys with a running maximum and sum, and writes no weights: Dao, "FlashAttention-2"
(2023), algorithm 1. Dot-product and additive scores share it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from regard.backends.triton import top
from regard.backends.triton.additive_score import raw_scores
from regard.backends.triton.args import RowSums
from regard.backends.triton.dropout import dropout_streams, keep_mask
from regard.backends.triton.score import (
    LN2,
    any_nonfinite,
    is_nonfinite,
    load_rows,
    matmul,
    nth_tile,
    scores,
    sigmoid,
    tile_range,
    write_rows,
    zero_nonfinite,
)


class Outputs(NamedTuple):
    """Destinations of the results of a forward pass: (B, H, L), or (num_splits, B, H, L) where the keys are split."""

    out: Any  # Matrix
    out_fp32: Any = None  # Matrix: the same in float32
    row_sums: Any = RowSums(None, None)  # saved for the backward pass
    lse: Any = None
    max: Any = None
    entropy: Any = None
    top_weights: Any = None  # (B, H, L, top)
    top_keys: Any = None
    split_stride: Any = 0  # B H L


@triton.jit
def fwd_kernel(q, k, v, outputs, args):
    """Attend to one split of the keys with one tile of queries, of one or several heads that share their keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask, the longest rows first
    groups = args.sizes.H // args.config.heads_per_tile
    b = tl.program_id(1) // groups
    first_head = tl.program_id(1) % groups * args.config.heads_per_tile
    g = first_head // (args.sizes.H // args.sizes.G)
    tile_row = tile * args.config.queries + tl.arange(0, args.config.queries)
    query = tile_row // args.config.heads_per_tile
    head = first_head + tile_row % args.config.heads_per_tile

    split = tl.program_id(2)
    start, full, count = tile_range(args, b, tile, args.config.keys, False)
    begin = (count * split) // tl.num_programs(2)
    end = (count * (split + 1)) // tl.num_programs(2)

    q_tile = load_rows(q, b, head, query, args.sizes.L, args.config.D, args.config.D_padded, True)
    middle = tl.minimum(tl.maximum(full, begin), end)
    m, z, t, out, best, keys = _init_state(args)
    m, z, t, out, best, keys = _attend_tiles(
        begin, middle, m, z, t, out, best, keys, q_tile, start, k, v, outputs, args, b, g, first_head, head, query,
        False, False,
    )  # fmt: skip
    m, z, t, out, best, keys = _attend_tiles(
        middle, end, m, z, t, out, best, keys, q_tile, start, k, v, outputs, args, b, g, first_head, head, query,
        True, False,
    )  # fmt: skip
    if args.config.num_literals > 0 and args.score.nonfinite_q is None:  # noqa: SIM102, the outer test is compiled away
        if any_nonfinite(out):
            # NaN or inf in masked values may have leaked: recompute the tile with nonfinite values masked.
            m, z, t, out, best, keys = _init_state(args)
            m, z, t, out, best, keys = _attend_tiles(
                begin, end, m, z, t, out, best, keys, q_tile, start, k, v, outputs, args, b, g, first_head, head, query,
                True, True,
            )  # fmt: skip

    sink_or_bias = tl.zeros([args.config.queries], tl.float32)
    if args.score.sink_or_bias is not None:
        sink_or_bias = tl.load(args.score.sink_or_bias + head)
        if not args.config.is_sigmoid:  # only one split contains the sink
            sink_or_bias = tl.where(split == 0, sink_or_bias, -float("inf"))
    inside = query < args.sizes.L
    row = split.to(tl.int64) * outputs.split_stride + (b * args.sizes.H + head).to(tl.int64) * args.sizes.L + query
    if args.config.is_sigmoid:
        m_total = m
        log2_sum = m_total + tl.log2(z)
        max_weight = sigmoid(m + sink_or_bias, args)
        entropy = -t * LN2
    else:
        m_total = m
        if args.score.sink_or_bias is not None:
            # The sink is part of the sum, and has no value.
            m_total = tl.maximum(m, sink_or_bias)
            base = tl.where(m_total == -float("inf"), 0.0, m_total)
            rescale = tl.exp2(m - base)
            t = tl.where(z > 0, rescale * (t + (m - base) * z), 0.0)
            z_keys = z * rescale
            z = z_keys + tl.exp2(sink_or_bias - base)
            out = out * rescale[:, None]
        else:
            z_keys = z
        z_safe = tl.where(z == 0.0, 1.0, z)
        out = out / z_safe[:, None]
        log2_sum = m_total + tl.log2(z)
        max_weight = tl.where(z == 0.0, 0.0, tl.exp2(m - log2_sum))
        entropy = tl.where(z == 0.0, 0.0, ((log2_sum - m_total) * z_keys - t) / z_safe * LN2)
    if args.score.seed is not None:
        out = out * args.score.dropout_scale
    if outputs.out_fp32 is not None:
        write_rows(outputs.out_fp32, b, head, query, args.sizes.L, args.config.E, args.config.E_padded, out)
    offset = split.to(tl.int64) * outputs.split_stride * args.config.E
    write_rows(outputs.out, b, head, query, args.sizes.L, args.config.E, args.config.E_padded, out, offset)
    if outputs.row_sums.log2_sum is not None:
        tl.store(outputs.row_sums.log2_sum + row, tl.where(z == 0.0, float("inf"), log2_sum), mask=inside)
    if outputs.row_sums.residual is not None:
        residual = tl.where(z == 0.0, 0.0, (m_total - log2_sum) + tl.log2(z))
        tl.store(outputs.row_sums.residual + row, residual, mask=inside)
    if outputs.lse is not None:
        tl.store(outputs.lse + row, log2_sum * LN2, mask=inside)
    if outputs.max is not None:
        tl.store(outputs.max + row, max_weight, mask=inside)
    if outputs.entropy is not None:
        tl.store(outputs.entropy + row, entropy, mask=inside)
    if args.config.top > 0:
        for n in tl.static_range(args.config.top):
            value, key, best = top.pop_largest(best, keys, n, args.config.top)
            weight = sigmoid(value + sink_or_bias, args) if args.config.is_sigmoid else tl.exp2(value - log2_sum)
            is_empty = value == -float("inf")
            tl.store(outputs.top_weights + row * args.config.top + n, tl.where(is_empty, 0.0, weight), mask=inside)
            tl.store(
                outputs.top_keys + row * args.config.top + n, tl.where(is_empty, -1, key).to(tl.int64), mask=inside
            )


@triton.jit
def _init_state(args):
    """The state of an empty row: m, z, t and the output, as defined in `_attend_tiles`, and the largest scores."""
    m = tl.full([args.config.queries], -float("inf"), tl.float32)
    z = tl.zeros([args.config.queries], tl.float32)
    t = tl.zeros([args.config.queries], tl.float32)
    out = tl.zeros([args.config.queries, args.config.E_padded], tl.float32)
    best, keys = top.init(args, args.config.queries)
    return m, z, t, out, best, keys


@triton.jit
def _attend_tiles(
    begin, end, m, z, t, out, best, keys, q_tile, start, k, v, outputs, args, b, g, first_head, head, query,
    is_partial: tl.constexpr, mask_nonfinite: tl.constexpr,
):  # fmt: skip
    """Update the state with the tiles of keys begin, ..., end - 1 of a list.

    With softmax, z = sum_j 2^(s_j - m), t = sum_j 2^(s_j - m) (s_j - m) and out = sum_j 2^(s_j - m) v_j over the keys
    so far.
    """
    sink_or_bias = tl.zeros([args.config.queries, 1], tl.float32)
    if args.config.is_sigmoid and args.score.sink_or_bias is not None:
        sink_or_bias = tl.load(args.score.sink_or_bias + head)[:, None]
    stream, factor = dropout_streams(args, b, head, query)
    for n in range(begin, end):
        tile = nth_tile(args, start, n)
        key = tile * args.config.keys + tl.arange(0, args.config.keys)
        kv_head = g + 0 * key
        k_tile = load_rows(k, b, kv_head, key, args.sizes.S, args.config.D, args.config.D_padded, is_partial)
        raw = raw_scores(q_tile, k_tile, args, b, first_head, query, key)
        # A scale alone is applied below, in one multiply-add with the subtraction of the maximum.
        scale = args.score.scale if args.config.is_scale_only else 1.0
        s, _ = scores(
            raw, args, b, g, head[:, None], query[:, None], key[None, :], is_partial, not args.config.is_scale_only
        )
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        rescale = tl.exp2(m - base)
        shifted = tl.maximum(s * scale - base[:, None], -1000.0)  # -inf * 0 would be NaN
        p = tl.exp2(s * scale - base[:, None])
        if args.config.is_sigmoid:
            if outputs.lse is not None:
                z = z * rescale + tl.sum(p, 1)
            p = sigmoid(s + sink_or_bias, args)
            if outputs.entropy is not None:
                t += tl.sum(p * tl.where(p > 0.0, tl.log2(p), 0.0), 1)
        else:
            if outputs.entropy is not None:
                t = tl.where(z > 0.0, rescale * (t + (m - base) * z), 0.0) + tl.sum(p * shifted, 1)
            z = z * rescale + tl.sum(p, 1)
            out = out * rescale[:, None]
        m = m_new
        if args.config.top > 0:
            best, keys = top.update(best, keys, s * scale, tile * args.config.keys, args.config.keys)
        if args.score.seed is not None:
            # Multiply instead of selecting: a row that attends to NaN stays NaN, whatever is dropped.
            p = p * tl.where(keep_mask(args, stream[:, None], factor[:, None], key[None, :]), 1.0, 0.0)
        v_tile = load_rows(v, b, kv_head, key, args.sizes.S, args.config.E, args.config.E_padded, is_partial)
        if mask_nonfinite:
            # NaN reaches only the rows that may attend to it: 0 * NaN would be NaN in all of them.
            num_nonfinite = matmul((s != -float("inf")).to(tl.float16), is_nonfinite(v_tile).to(tl.float16), args)
            out = tl.where(num_nonfinite > 0.0, float("nan"), out)
            v_tile = zero_nonfinite(v_tile)
        if args.config.has_exact_weights and v_tile.dtype != tl.float32:
            # Split the weights into three terms that hold all their digits. Rounded weights sum to something else than
            # 1, which the gradients of parameters would show.
            for _ in tl.static_range(2):
                rounded = p.to(v_tile.dtype)
                out += matmul(rounded, v_tile, args)
                p -= rounded.to(tl.float32)
        out += matmul(p.to(v_tile.dtype), v_tile, args)
    return m, z, t, out, best, keys
