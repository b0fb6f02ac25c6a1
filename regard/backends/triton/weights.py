"""What can only be told of weights once the sum of their row is known, on the GPU: how much attention each key receives, and
whole rows. A pass of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regard.backends.triton.additive_score import products
from regard.backends.triton.score import listed, rows, scores, span, weights


@triton.jit
def receive(q, k, received, row_sums, call):
    """What a tile of keys receives (B, H, S), of one head."""
    tile = tl.program_id(0)
    b = tl.program_id(1) // call.sizes.H
    head = tl.program_id(1) % call.sizes.H
    g = head // (call.sizes.H // call.sizes.G)
    key = tile * call.form.keys + tl.arange(0, call.form.keys)
    start, full, count = span(call, b, tile, call.form.queries, True)
    other = rows(k, b, g + 0 * key, key, call.sizes.S, call.form.D, call.form.wide_d, True)
    sums = tl.zeros([call.form.keys], tl.float32)
    sums = _over_queries(0, full, sums, other, start, q, row_sums, call, b, g, head, key, False)
    sums = _over_queries(full, count, sums, other, start, q, row_sums, call, b, g, head, key, True)
    tl.store(received + (b * call.sizes.H + head) * call.sizes.S + key, sums, mask=key < call.sizes.S)


@triton.jit
def _over_queries(begin, end, sums, other, start, q, row_sums, call, b, g, head, key, masked: tl.constexpr):
    for n in range(begin, end):
        query = listed(call, start, n) * call.form.queries + tl.arange(0, call.form.queries)
        own = rows(q, b, head + 0 * query, query, call.sizes.L, call.form.D, call.form.wide_d, masked)
        product = products(own, other, call, b, head, query, key)
        s, _ = scores(product, call, b, g, head, query[:, None], key[None, :], masked)
        p = weights(s, row_sums, call, b, head, query[:, None])
        if masked or call.words.bias is not None:
            p = tl.where(s == -float("inf"), 0.0, p)
        sums += tl.sum(p, 0)
    return sums


@triton.jit
def write(q, k, written, numbers, count, row_sums, call):
    """The weights (B, H, count, S) of the queries with these numbers; None for all."""
    place = tl.program_id(1) * call.form.queries + tl.arange(0, call.form.queries)
    key = tl.program_id(0) * call.form.keys + tl.arange(0, call.form.keys)
    b = tl.program_id(2) // call.sizes.H
    head = tl.program_id(2) % call.sizes.H
    g = head // (call.sizes.H // call.sizes.G)
    query = place
    if numbers is not None:
        query = tl.load(numbers + place, mask=place < count, other=0)
    own = rows(q, b, head + 0 * query, query, call.sizes.L, call.form.D, call.form.wide_d, True)
    other = rows(k, b, g + 0 * key, key, call.sizes.S, call.form.D, call.form.wide_d, True)
    product = products(own, other, call, b, head, query, key)
    s, _ = scores(product, call, b, g, head, query[:, None], key[None, :], True)
    p = weights(s, row_sums, call, b, head, query[:, None])
    p = tl.where(s == -float("inf"), 0.0, p)
    at = (tl.program_id(2).to(tl.int64) * count + place[:, None]) * call.sizes.S + key[None, :]
    tl.store(written + at, p, mask=(place < count)[:, None] & (key < call.sizes.S)[None, :])
