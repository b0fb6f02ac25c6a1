"""The backward pass on the GPU: weights are computed again from the scores and the sums that the forward pass kept.

A kernel for the queries and one for the keys, each of which writes its own rows alone: the same bits every time. Dao,
"FlashAttention-2" (2023), algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from regard.backends.triton.additive_score import products
from regard.backends.triton.dropout import keep, streams
from regard.backends.triton.score import (
    LN2,
    any_wild,
    listed,
    rows,
    scores,
    span,
    times,
    weights,
    without_wild,
    write_rows,
)


class Kept(NamedTuple):
    """What the backward pass is given: the sum of each row, and of these sum_j p_j dp_j (B, H, L), less the gradient of the
    log-sum-exp."""

    sums: Any  # RowSums
    delta: Any


class Pulled(NamedTuple):
    """Where the gradients go; None where one is not wanted."""

    q: Any  # Matrix
    k: Any
    v: Any
    key_bias: Any  # (B, G, S)
    query_bias: Any  # (B, H, L)
    level: Any  # (B, H, L): of what a sigmoid adds to the scores


@triton.jit
def slopes(
    product, dp, kept, call, b, g, head, query, key, stream, factor,
    masked: tl.constexpr, careful: tl.constexpr,
):  # fmt: skip
    """Of a tile: the weights as the values see them, and the gradients of its scores, after and before the softcap; with
    care, 0 where a pair may not attend, even in a row of NaN.
    """
    s, rise = scores(product, call, b, g, head, query, key, masked)
    row = (b * call.sizes.H + head) * call.sizes.L + query
    delta = tl.load(kept.delta + row, mask=query < call.sizes.L, other=0.0)
    p = weights(s, kept.sums, call, b, head, query)
    seen = p
    if call.words.seed is not None:
        survives = keep(call, stream, factor, key)
        seen = tl.where(survives, p * call.words.kept, 0.0)
        dp = tl.where(survives, dp * call.words.kept, 0.0)
    if call.form.sigmoid:
        ds = p * (1.0 - p) * dp
    else:
        ds = p * (dp - delta)
    before = ds * rise
    if careful:
        ds = tl.where(s == -float("inf"), 0.0, ds)
        before = tl.where(s == -float("inf"), 0.0, before)
        seen = tl.where(s == -float("inf"), 0.0, seen)
    return seen, ds, before


@triton.jit
def pull_queries(q, k, v, dout, pulled, kept, call):
    """The gradients of a tile of queries."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // call.sizes.H
    head = tl.program_id(1) % call.sizes.H
    g = head // (call.sizes.H // call.sizes.G)
    query = tile * call.form.queries + tl.arange(0, call.form.queries)
    heads = head + 0 * query
    start, full, count = span(call, b, tile, call.form.keys, False)
    own = rows(q, b, heads, query, call.sizes.L, call.form.D, call.form.wide_d, True)
    pull = rows(dout, b, heads, query, call.sizes.L, call.form.E, call.form.wide_e, True)
    dq, dbias, dlevel = _no_queries(call)
    dq, dbias, dlevel = _over_keys(
        0, full, dq, dbias, dlevel, own, pull, start, k, v, kept, call, b, g, head, query, False, False
    )
    dq, dbias, dlevel = _over_keys(
        full, count, dq, dbias, dlevel, own, pull, start, k, v, kept, call, b, g, head, query, True, False
    )
    if call.form.literals > 0 or call.words.bias is not None:  # noqa: SIM102, this one the compiler decides
        if any_wild(dq):
            # 0 * NaN is NaN: what may not attend may have leaked. Once more, with care.
            dq, dbias, dlevel = _no_queries(call)
            dq, dbias, dlevel = _over_keys(
                0, count, dq, dbias, dlevel, own, pull, start, k, v, kept, call, b, g, head, query, True, True
            )
    row = (b * call.sizes.H + head) * call.sizes.L + query
    if pulled.q is not None:
        write_rows(
            pulled.q, b, heads, query, call.sizes.L, call.form.D, call.form.wide_d, dq * (call.words.scale * LN2)
        )
    if pulled.query_bias is not None:
        tl.store(pulled.query_bias + row, dbias, mask=query < call.sizes.L)
    if pulled.level is not None:
        tl.store(pulled.level + row, dlevel, mask=query < call.sizes.L)


@triton.jit
def _no_queries(call):
    dq = tl.zeros([call.form.queries, call.form.wide_d], tl.float32)
    return dq, tl.zeros([call.form.queries], tl.float32), tl.zeros([call.form.queries], tl.float32)


@triton.jit
def _over_keys(
    begin, end, dq, dbias, dlevel, own, pull, start, k, v, kept, call, b, g, head, query,
    masked: tl.constexpr, careful: tl.constexpr,
):  # fmt: skip
    stream, factor = streams(call, b, head, query[:, None])
    for n in range(begin, end):
        key = listed(call, start, n) * call.form.keys + tl.arange(0, call.form.keys)
        shared = g + 0 * key
        other = rows(k, b, shared, key, call.sizes.S, call.form.D, call.form.wide_d, masked)
        value = rows(v, b, shared, key, call.sizes.S, call.form.E, call.form.wide_e, masked)
        product = products(own, other, call, b, head, query, key)
        if careful:
            # Who may attend to it has NaN in its score.
            other = without_wild(other)
        dp = times(pull, tl.trans(value), call)
        _, ds, before = slopes(
            product, dp, kept, call, b, g, head, query[:, None], key[None, :], stream, factor, masked, careful
        )
        dq += times(before.to(own.dtype), other, call)
        dbias += tl.sum(before, 1)
        dlevel += tl.sum(ds, 1)
    return dq, dbias, dlevel


@triton.jit
def pull_keys(q, k, v, dout, pulled, kept, call):
    """The gradients of a tile of keys and values, from all query heads that share them."""
    tile = tl.program_id(0)
    b = tl.program_id(1) // call.sizes.G
    g = tl.program_id(1) % call.sizes.G
    key = tile * call.form.keys + tl.arange(0, call.form.keys)
    shared = g + 0 * key
    start, full, count = span(call, b, tile, call.form.queries, True)
    own = rows(k, b, shared, key, call.sizes.S, call.form.D, call.form.wide_d, True)
    value = rows(v, b, shared, key, call.sizes.S, call.form.E, call.form.wide_e, True)
    dk, dv, dbias = _no_keys(call)
    repeats = call.sizes.H // call.sizes.G
    for r in range(repeats):
        head = g * repeats + r
        dk, dv, dbias = _over_queries(
            0, full, dk, dv, dbias, own, value, start, q, dout, kept, call, b, g, head, key, False, False
        )
        dk, dv, dbias = _over_queries(
            full, count, dk, dv, dbias, own, value, start, q, dout, kept, call, b, g, head, key, True, False
        )
    if call.form.literals > 0 or call.words.bias is not None:  # noqa: SIM102, this one the compiler decides
        if any_wild(dk) | any_wild(dv):
            dk, dv, dbias = _no_keys(call)
            for r in range(repeats):
                head = g * repeats + r
                dk, dv, dbias = _over_queries(
                    0, count, dk, dv, dbias, own, value, start, q, dout, kept, call, b, g, head, key, True, True
                )
    if pulled.k is not None:
        write_rows(pulled.k, b, shared, key, call.sizes.S, call.form.D, call.form.wide_d, dk * (call.words.scale * LN2))
    if pulled.v is not None:
        write_rows(pulled.v, b, shared, key, call.sizes.S, call.form.E, call.form.wide_e, dv)
    if pulled.key_bias is not None:
        tl.store(pulled.key_bias + (b * call.sizes.G + g) * call.sizes.S + key, dbias, mask=key < call.sizes.S)


@triton.jit
def _no_keys(call):
    dk = tl.zeros([call.form.keys, call.form.wide_d], tl.float32)
    dv = tl.zeros([call.form.keys, call.form.wide_e], tl.float32)
    return dk, dv, tl.zeros([call.form.keys], tl.float32)


@triton.jit
def _over_queries(
    begin, end, dk, dv, dbias, own, value, start, q, dout, kept, call, b, g, head, key,
    masked: tl.constexpr, careful: tl.constexpr,
):  # fmt: skip
    for n in range(begin, end):
        query = listed(call, start, n) * call.form.queries + tl.arange(0, call.form.queries)
        heads = head + 0 * query
        other = rows(q, b, heads, query, call.sizes.L, call.form.D, call.form.wide_d, masked)
        pull = rows(dout, b, heads, query, call.sizes.L, call.form.E, call.form.wide_e, masked)
        stream, factor = streams(call, b, head, query[None, :])
        # Keys down, queries across: as the two products that follow take them.
        product = times(own, tl.trans(other), call)
        if careful:
            # Who may attend as it has NaN in its score.
            other = without_wild(other)
        dp = times(value, tl.trans(pull), call)
        seen, _, before = slopes(
            product, dp, kept, call, b, g, head, query[None, :], key[:, None], stream, factor, masked, careful
        )
        dv += times(seen.to(pull.dtype), pull, call)
        dk += times(before.to(own.dtype), other, call)
        dbias += tl.sum(before, 1)
    return dk, dv, dbias
