"""From raw scores to the scores and weights of a tile, in units of log2(e), and the helpers that all kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from regard.backends.triton.mask import allowed

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x, b, h, row, count, width: tl.constexpr, padded: tl.constexpr, bounded: tl.constexpr):
    """Load rows of a matrix, padded with 0 to a width that `tl.dot` takes. `h` and `row` have the same shape."""
    column = tl.arange(0, padded)
    at = x.pointer + b.to(tl.int64) * x.b + (h.to(tl.int64) * x.h + row.to(tl.int64) * x.row)[:, None] + column[None, :]
    if bounded:
        x = tl.load(at, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    elif width == padded:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(column < width)[None, :], other=0.0)
    return x


@triton.jit
def write_rows(x, b, h, row, count, width: tl.constexpr, padded: tl.constexpr, value, offset=0):
    """Write rows of a matrix, `offset` elements after its start."""
    column = tl.arange(0, padded)
    at = (
        x.pointer
        + offset
        + b.to(tl.int64) * x.b
        + (h.to(tl.int64) * x.h + row.to(tl.int64) * x.row)[:, None]
        + column[None, :]
    )
    tl.store(at, value, mask=(row < count)[:, None] & (column < width)[None, :])


@triton.jit
def is_nonfinite(x):
    """Which elements are NaN or inf."""
    return ~(tl.abs(x.to(tl.float32)) < float("inf"))


@triton.jit
def any_nonfinite(x):
    """Whether any element of a tile is NaN or inf."""
    return tl.max(tl.max(is_nonfinite(x).to(tl.int32), 1), 0) > 0


@triton.jit
def zero_nonfinite(x):
    """Replace NaN and inf by 0: times the weight 0 of a masked pair, they would give NaN."""
    return tl.where(is_nonfinite(x), 0.0, x)


@triton.jit
def matmul(a, b, args):
    """The product of two tiles, in float32.

    Operands of different dtypes are widened first. In the interpreter all are, as it multiplies bfloat16 as integers.
    """
    if args.config.is_interpreted or a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def reciprocal(x, args):
    """1 / x in one instruction, with an error of about one unit in the last place. A division takes eight.

    Subnormal inputs and results are flushed to zero.
    """
    if args.config.is_interpreted:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return y


@triton.jit
def tanh(x, args):
    """The hyperbolic tangent of x, and its derivative."""
    # Near 0, 1 - e^-2x cancels: there the Taylor series is used. Where tanh is near 1, 1 - tanh^2 cancels: the
    # derivative is computed from the exponential instead.
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488))))
    power = tl.exp2(size * (-2.0 * LOG2E))
    inverse = reciprocal(1.0 + power, args)
    large = (1.0 - power) * inverse
    near = size < 0.25
    value = tl.where(near, series, tl.where(x < 0.0, -large, large))
    return value, tl.where(near, 1.0 - series * series, 4.0 * power * inverse * inverse)


@triton.jit
def scores(raw, args, b, g, head, query, key, is_partial: tl.constexpr, is_scaled: tl.constexpr = True):
    """The scores of a tile, -inf where a pair is masked, and the derivative of the softcap.

    `query` and `key` broadcast to the tile, `head` to the queries. The scale is applied if `is_scaled`.
    """
    s = raw * args.score.scale if is_scaled else raw
    is_valid = (query < args.sizes.L) & (key < args.sizes.S)
    row = (b * args.sizes.H + head) * args.sizes.L + query
    if args.score.key_bias is not None:
        s += tl.load(
            args.score.key_bias + (b * args.sizes.G + g) * args.sizes.S + key, mask=key < args.sizes.S, other=0.0
        )
    if args.score.query_bias is not None:
        s += tl.load(args.score.query_bias + row, mask=query < args.sizes.L, other=0.0)
    softcap_grad = tl.full([1, 1], 1.0, tl.float32)
    if args.score.softcap is not None:
        t, softcap_grad = tanh(s * (1.0 / args.score.softcap), args)
        s = args.score.softcap * t
    if args.score.bias is not None:
        bias = args.score.bias
        start = bias.pointer + b.to(tl.int64) * bias.b + head.to(tl.int64) * bias.h
        s += tl.load(start + query * bias.query + key * bias.key, mask=is_valid, other=0.0).to(tl.float32) * LOG2E
    if args.score.alibi_slopes is not None:
        slope = tl.load(args.score.alibi_slopes + head)
        s -= slope * tl.abs(query + args.score.alibi_offset - key).to(tl.float32)
    if args.score.relative_bias is not None:
        width = args.sizes.L + args.sizes.S + 63
        at = args.score.relative_bias + head * width + query - key + args.sizes.S - 1
        s += tl.load(at, mask=is_valid, other=0.0)
    if args.score.nonfinite_q is not None:
        nonfinite_q = tl.load(args.score.nonfinite_q + row, mask=query < args.sizes.L, other=0) != 0
        at = args.score.nonfinite_k + (b * args.sizes.G + g) * args.sizes.S + key
        nonfinite_k = tl.load(at, mask=key < args.sizes.S, other=0) != 0
        s = tl.where(nonfinite_q | nonfinite_k, float("nan"), s)
    if is_partial:
        if args.config.num_literals > 0:
            is_valid = is_valid & allowed(args, b, head, query, key)
        s = tl.where(is_valid, s, -float("inf"))
    return s, softcap_grad


@triton.jit
def sigmoid(s, args):
    """1 / (1 + 2^-s)."""
    return reciprocal(1.0 + tl.exp2(-s), args)


@triton.jit
def weights(s, row_sums, args, b, head, query):
    """The weights of a tile, from its scores and `RowSums`."""
    if args.config.is_sigmoid:
        if args.score.sink_or_bias is not None:
            s += tl.load(args.score.sink_or_bias + head)
        p = sigmoid(s, args)
    else:
        row = (b * args.sizes.H + head) * args.sizes.L + query
        log_p = s - tl.load(row_sums.log2_sum + row, mask=query < args.sizes.L, other=float("inf"))
        if row_sums.residual is not None:
            log_p -= tl.load(row_sums.residual + row, mask=query < args.sizes.L, other=0.0)
        p = tl.exp2(log_p)
    return p


@triton.jit
def tile_range(args, b, row, width: tl.constexpr, transposed: tl.constexpr):
    """The start of the tile list of a row of tiles, and how many tiles are full and how many there are.

    `width` is the size of a tile along the list: keys, or queries if `transposed`.
    """
    if args.tiles.order is None:
        start = row * 0
        length = args.sizes.L if transposed else args.sizes.S
        full = length // width
        count = (length + width - 1) // width
    else:
        at = b * args.tiles.batch_stride * args.tiles.rows + row
        start = args.tiles.order + at.to(tl.int64) * args.tiles.columns
        full = tl.load(args.tiles.counts + 2 * at)
        count = full + tl.load(args.tiles.counts + 2 * at + 1)
    return start, full, count


@triton.jit
def nth_tile(args, start, n):
    """The index of the n-th tile of a list."""
    if args.tiles.order is None:
        tile = n
    else:
        tile = tl.load(start + n)
    return tile
