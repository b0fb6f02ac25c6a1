"""The forward pass on the GPU: scores, weights, weighted sum and summaries, a tile of queries at a time.

Keys go by in tiles, the largest score and the sum so far ride along, and no weight is written: Dao et al.,
"FlashAttention-2" (2023), algorithm 1. Both families of scores run through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from regard.backends.triton import top
from regard.backends.triton.additive_score import products
from regard.backends.triton.args import RowSums
from regard.backends.triton.dropout import keep, streams
from regard.backends.triton.score import (
    LN2,
    any_wild,
    is_wild,
    listed,
    rows,
    scores,
    sigmoid,
    span,
    times,
    without_wild,
    write_rows,
)


class Found(NamedTuple):
    """Where the results of a forward pass go: (B, H, L), one after another for each part of keys that are split."""

    out: Any  # Matrix
    exact: Any = None  # Matrix: the same in float32
    sums: Any = RowSums(None, None)  # for the backward pass
    lse: Any = None
    max: Any = None
    entropy: Any = None
    top_weights: Any = None  # (B, H, L, k)
    top_keys: Any = None
    part: Any = 0  # numbers (B, H, L) of a part


@triton.jit
def forward(q, k, v, found, call):
    """One tile of queries of one head (or of `repeats` heads that share their keys), for one part of the keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask, the longest first
    heads = call.sizes.H // call.form.repeats
    b = tl.program_id(1) // heads
    first = tl.program_id(1) % heads * call.form.repeats
    g = first // (call.sizes.H // call.sizes.G)
    place = tile * call.form.queries + tl.arange(0, call.form.queries)
    query = place // call.form.repeats
    head = first + place % call.form.repeats

    part = tl.program_id(2)
    start, full, count = span(call, b, tile, call.form.keys, False)
    begin = (count * part) // tl.num_programs(2)
    end = (count * (part + 1)) // tl.num_programs(2)

    own = rows(q, b, head, query, call.sizes.L, call.form.D, call.form.wide_d, True)
    middle = tl.minimum(tl.maximum(full, begin), end)
    m, z, t, out, best, keys = _nothing(call)
    m, z, t, out, best, keys = _sweep(
        begin, middle, m, z, t, out, best, keys, own, start, k, v, found, call, b, g, first, head, query, False, False
    )
    m, z, t, out, best, keys = _sweep(
        middle, end, m, z, t, out, best, keys, own, start, k, v, found, call, b, g, first, head, query, True, False
    )
    if call.form.literals > 0 and call.words.nonfinite_q is None:  # noqa: SIM102, this one the compiler decides
        if any_wild(out):
            # NaN or inf in a value may have leaked to a row that may not attend to it: once more, with care.
            m, z, t, out, best, keys = _nothing(call)
            m, z, t, out, best, keys = _sweep(
                begin, end, m, z, t, out, best, keys, own, start, k, v, found, call, b, g, first, head, query, True, True
            )  # fmt: skip

    level = tl.zeros([call.form.queries], tl.float32)
    if call.words.level is not None:
        level = tl.load(call.words.level + head)
        if not call.form.sigmoid:  # a sink is in one part of the keys alone
            level = tl.where(part == 0, level, -float("inf"))
    inside = query < call.sizes.L
    row = part.to(tl.int64) * found.part + (b * call.sizes.H + head).to(tl.int64) * call.sizes.L + query
    if call.form.sigmoid:
        peak = m
        total = peak + tl.log2(z)
        share = sigmoid(m + level, call)
        entropy = -t * LN2
    else:
        peak = m
        if call.words.level is not None:
            # A sink takes part in the sum, and has no value.
            peak = tl.maximum(m, level)
            base = tl.where(peak == -float("inf"), 0.0, peak)
            shrink = tl.exp2(m - base)
            t = tl.where(z > 0, shrink * (t + (m - base) * z), 0.0)
            of_keys = z * shrink
            z = of_keys + tl.exp2(level - base)
            out = out * shrink[:, None]
        else:
            of_keys = z
        one = tl.where(z == 0.0, 1.0, z)
        out = out / one[:, None]
        total = peak + tl.log2(z)
        share = tl.where(z == 0.0, 0.0, tl.exp2(m - total))
        entropy = tl.where(z == 0.0, 0.0, ((total - peak) * of_keys - t) / one * LN2)
    if call.words.seed is not None:
        out = out * call.words.kept
    if found.exact is not None:
        write_rows(found.exact, b, head, query, call.sizes.L, call.form.E, call.form.wide_e, out)
    skip = part.to(tl.int64) * found.part * call.form.E
    write_rows(found.out, b, head, query, call.sizes.L, call.form.E, call.form.wide_e, out, skip)
    if found.sums.total is not None:
        tl.store(found.sums.total + row, tl.where(z == 0.0, float("inf"), total), mask=inside)
    if found.sums.rest is not None:
        tl.store(found.sums.rest + row, tl.where(z == 0.0, 0.0, (peak - total) + tl.log2(z)), mask=inside)
    if found.lse is not None:
        tl.store(found.lse + row, total * LN2, mask=inside)
    if found.max is not None:
        tl.store(found.max + row, share, mask=inside)
    if found.entropy is not None:
        tl.store(found.entropy + row, entropy, mask=inside)
    if call.form.top > 0:
        for n in tl.static_range(call.form.top):
            value, key, best = top.largest_first(best, keys, n, call.form.top)
            weight = sigmoid(value + level, call) if call.form.sigmoid else tl.exp2(value - total)
            absent = value == -float("inf")
            tl.store(found.top_weights + row * call.form.top + n, tl.where(absent, 0.0, weight), mask=inside)
            tl.store(found.top_keys + row * call.form.top + n, tl.where(absent, -1, key).to(tl.int64), mask=inside)


@triton.jit
def _nothing(call):
    """Of each row the largest score, the sums of weights and for the entropy, the output, and the largest weights."""
    m = tl.full([call.form.queries], -float("inf"), tl.float32)
    z = tl.zeros([call.form.queries], tl.float32)
    t = tl.zeros([call.form.queries], tl.float32)
    out = tl.zeros([call.form.queries, call.form.wide_e], tl.float32)
    best, keys = top.nothing(call, call.form.queries)
    return m, z, t, out, best, keys


@triton.jit
def _sweep(
    begin, end, m, z, t, out, best, keys, own, start, k, v, found, call, b, g, first, head, query,
    masked: tl.constexpr, careful: tl.constexpr,
):  # fmt: skip
    level = tl.zeros([call.form.queries, 1], tl.float32)
    if call.form.sigmoid and call.words.level is not None:
        level = tl.load(call.words.level + head)[:, None]
    stream, factor = streams(call, b, head, query)
    for n in range(begin, end):
        tile = listed(call, start, n)
        key = tile * call.form.keys + tl.arange(0, call.form.keys)
        shared = g + 0 * key
        other = rows(k, b, shared, key, call.sizes.S, call.form.D, call.form.wide_d, masked)
        product = products(own, other, call, b, first, query, key)
        # Where nothing but a scale makes scores of products, it is left to what follows, which multiplies and adds at once.
        scale = call.words.scale if call.form.bare else 1.0
        s, _ = scores(product, call, b, g, head[:, None], query[:, None], key[None, :], masked, not call.form.bare)
        highest = tl.maximum(m, tl.max(s, 1) * scale)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        shrink = tl.exp2(m - base)
        apart = tl.maximum(s * scale - base[:, None], -1000.0)  # -inf times 0 is no number
        p = tl.exp2(s * scale - base[:, None])
        if call.form.sigmoid:
            if found.lse is not None:
                z = z * shrink + tl.sum(p, 1)
            p = sigmoid(s + level, call)
            if found.entropy is not None:
                t += tl.sum(p * tl.where(p > 0.0, tl.log2(p), 0.0), 1)
        else:
            if found.entropy is not None:
                t = tl.where(z > 0.0, shrink * (t + (m - base) * z), 0.0) + tl.sum(p * apart, 1)
            z = z * shrink + tl.sum(p, 1)
            out = out * shrink[:, None]
        m = highest
        if call.form.top > 0:
            best, keys = top.take(best, keys, s * scale, tile * call.form.keys, call.form.keys)
        if call.words.seed is not None:
            # By a product: a row that attends to NaN is NaN, whatever is dropped.
            p = p * tl.where(keep(call, stream[:, None], factor[:, None], key[None, :]), 1.0, 0.0)
        value = rows(v, b, shared, key, call.sizes.S, call.form.E, call.form.wide_e, masked)
        if careful:
            # NaN goes to the rows that may attend to it and to no others: 0 * NaN would be NaN.
            reached = times((s != -float("inf")).to(tl.float16), is_wild(value).to(tl.float16), call)
            out = tl.where(reached > 0.0, float("nan"), out)
            value = without_wild(value)
        if call.form.exact and value.dtype != tl.float32:
            # In three parts, which hold all digits: weights that are rounded no longer sum to what they were, and a
            # parameter's gradient knows.
            for _ in tl.static_range(2):
                part = p.to(value.dtype)
                out += times(part, value, call)
                p -= part.to(tl.float32)
        out += times(p.to(value.dtype), value, call)
    return m, z, t, out, best, keys
