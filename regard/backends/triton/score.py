"""From products to scores, in units of log2 e, on the GPU: all that a plan says of a pair of query and key."""

from __future__ import annotations

import triton
import triton.language as tl

from regard.backends.triton.mask import allowed

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def rows(x, b, h, row, count, width: tl.constexpr, wide: tl.constexpr, bounded: tl.constexpr):
    """Some rows of a matrix, filled up with 0 to a width that a product takes; `h` and `row` are of one shape."""
    column = tl.arange(0, wide)
    at = x.pointer + b.to(tl.int64) * x.b + (h.to(tl.int64) * x.h + row.to(tl.int64) * x.row)[:, None] + column[None, :]
    if bounded:
        x = tl.load(at, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    elif width == wide:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(column < width)[None, :], other=0.0)
    return x


@triton.jit
def write_rows(x, b, h, row, count, width: tl.constexpr, wide: tl.constexpr, value, skip=0):
    """Write some rows of a matrix, so many numbers further on."""
    column = tl.arange(0, wide)
    at = (
        x.pointer
        + skip
        + b.to(tl.int64) * x.b
        + (h.to(tl.int64) * x.h + row.to(tl.int64) * x.row)[:, None]
        + column[None, :]
    )
    tl.store(at, value, mask=(row < count)[:, None] & (column < width)[None, :])


@triton.jit
def is_wild(x):
    """Which numbers are NaN or inf?"""
    return ~(tl.abs(x.to(tl.float32)) < float("inf"))


@triton.jit
def any_wild(x):
    """Is any number of a tile NaN or inf?"""
    return tl.max(tl.max(is_wild(x).to(tl.int32), 1), 0) > 0


@triton.jit
def without_wild(x):
    """The numbers of a tile with 0 for NaN and inf, as the weight 0 of a pair that may not attend makes NaN of them."""
    return tl.where(is_wild(x), 0.0, x)


@triton.jit
def times(a, b, call):
    """The product of two tiles, in float32; of mixed types both are widened, and so is all that the interpreter multiplies,
    which takes bfloat16 for whole numbers.
    """
    if call.form.interpreted or a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def reciprocal(x, call):
    """1 / x, of a float of middling size: one instruction, exact to the last place or so, where a division takes eight."""
    if call.form.interpreted:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return y


@triton.jit
def tanh(x, call):
    """Of x, tanh and 1 - tanh^2."""
    # Near 0 by its series, as 1 - e^-2x keeps no digits there; and where tanh is near 1, one less its square keeps none.
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488))))
    power = tl.exp2(size * (-2.0 * LOG2E))
    one = reciprocal(1.0 + power, call)
    large = (1.0 - power) * one
    near = size < 0.25
    value = tl.where(near, series, tl.where(x < 0.0, -large, large))
    return value, tl.where(near, 1.0 - series * series, 4.0 * power * one * one)


@triton.jit
def scores(product, call, b, g, head, query, key, masked: tl.constexpr, scaled: tl.constexpr = True):
    """The scores of a tile, -inf where a pair may not attend; and by how much each grows with what stands before the
    softcap. `query` and `key` broadcast to the tile, `head` to the queries.
    """
    s = product * call.words.scale if scaled else product
    known = (query < call.sizes.L) & (key < call.sizes.S)
    row = (b * call.sizes.H + head) * call.sizes.L + query  # of what there is per query
    if call.words.key_bias is not None:
        s += tl.load(
            call.words.key_bias + (b * call.sizes.G + g) * call.sizes.S + key, mask=key < call.sizes.S, other=0.0
        )
    if call.words.query_bias is not None:
        s += tl.load(call.words.query_bias + row, mask=query < call.sizes.L, other=0.0)
    rise = tl.full([1, 1], 1.0, tl.float32)
    if call.words.softcap is not None:
        t, rise = tanh(s * (1.0 / call.words.softcap), call)
        s = call.words.softcap * t
    if call.words.bias is not None:
        bias = call.words.bias
        of_head = bias.pointer + b.to(tl.int64) * bias.b + head.to(tl.int64) * bias.h
        s += tl.load(of_head + query * bias.query + key * bias.key, mask=known, other=0.0).to(tl.float32) * LOG2E
    if call.words.slopes is not None:
        slope = tl.load(call.words.slopes + head)
        s -= slope * tl.abs(query + call.words.offset - key).to(tl.float32)
    if call.words.relative is not None:
        width = call.sizes.L + call.sizes.S + 63
        s += tl.load(call.words.relative + head * width + query - key + call.sizes.S - 1, mask=known, other=0.0)
    if call.words.nonfinite_q is not None:
        bad = tl.load(call.words.nonfinite_q + row, mask=query < call.sizes.L, other=0) != 0
        bad = bad | (
            tl.load(
                call.words.nonfinite_k + (b * call.sizes.G + g) * call.sizes.S + key, mask=key < call.sizes.S, other=0
            )
            != 0
        )
        s = tl.where(bad, float("nan"), s)
    if masked:
        if call.form.literals > 0:
            known = known & allowed(call, b, head, query, key)
        s = tl.where(known, s, -float("inf"))
    return s, rise


@triton.jit
def sigmoid(s, call):
    """1 / (1 + 2^-s)."""
    return reciprocal(1.0 + tl.exp2(-s), call)


@triton.jit
def weights(s, sums, call, b, head, query):
    """The weights of a tile, from its scores and the sum of each row."""
    if call.form.sigmoid:
        if call.words.level is not None:
            s += tl.load(call.words.level + head)
        p = sigmoid(s, call)
    else:
        row = (b * call.sizes.H + head) * call.sizes.L + query
        less = s - tl.load(sums.total + row, mask=query < call.sizes.L, other=float("inf"))
        if sums.rest is not None:
            less -= tl.load(sums.rest + row, mask=query < call.sizes.L, other=0.0)
        p = tl.exp2(less)
    return p


@triton.jit
def span(call, b, row, wide: tl.constexpr, turned: tl.constexpr):
    """The list of the tiles of a row: where it begins, how many are full, and how many there are."""
    if call.tiles.order is None:
        start = row * 0
        length = call.sizes.L if turned else call.sizes.S
        full = length // wide
        count = (length + wide - 1) // wide
    else:
        at = b * call.tiles.b * call.tiles.rows + row
        start = call.tiles.order + at.to(tl.int64) * call.tiles.columns
        full = tl.load(call.tiles.counts + 2 * at)
        count = full + tl.load(call.tiles.counts + 2 * at + 1)
    return start, full, count


@triton.jit
def listed(call, start, n):
    """The number of the n-th tile of a list."""
    if call.tiles.order is None:
        tile = n
    else:
        tile = tl.load(start + n)
    return tile
