"""Additive scores on the GPU, s = sum over d of w_d tanh(q_d + k_d), without a tanh for each of L x S x D places.

    w tanh(x) = w - 2 w / (1 + e^2x)        e^2x = e^2q e^2k: (L + S) D exponentials do for L S D of them

With the sign of w given to x, what is left is a sum of fractions 1 / t, t = c + (c e^2q) e^2k, c = 1 / |w|. Four of them
share one division, and each pair is centred: its mean, where tanh is 0, is taken from the numerator before the division. The
same form serves the CPU: csrc/additive.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.score import reciprocal, tanh, times

TWICE = 2.8853900817779268  # 2 log2 e
# The exponentials of q or k beyond +-30 leave the range of floats; sums of fewer than eight are not yet those of fractions,
# whose errors are 3 to 6 times those of tanh: there tanh itself is taken.
_REACH = 30.0 * TWICE
_FEWEST = 8
# Beyond 2^29, 1 / t is nothing, and four of them are no float any more.
MOST: tl.constexpr = tl.constexpr(2.0**29)


class Turned(NamedTuple):
    """An additive score as the kernels take it. Tiles of rows know how far their numbers reach, as powers of two."""

    weight: Any  # (heads, D)
    inverse: Any  # (heads, fours of D): c, in units of the largest weight
    mean: Any  # (heads, fours of D / 2): less what each pair of 1 / t is where tanh is 0
    factor: Any  # (heads,): -2 times the largest weight
    smallest: Any  # (heads,): log2 of the largest c
    head: Any  # 1 where each head has weights of its own
    repeats: Any  # heads that share their keys: none where those have weights of their own
    power_q: Any  # (B, H, fours of D, whole tiles of L): c e^2q
    power_k: Any  # (B, G|H, fours of D, whole tiles of S): e^2k
    angle_q: Any  # (B, H, D, whole tiles of L), and
    angle_k: Any  # (B, G|H, D, whole tiles of S): q and k
    reach_q: Any  # (B, H, tiles)
    reach_k: Any  # (B, G|H, tiles)
    width: Any  # D, and
    fours: Any  # the same, filled up: not constants, as loops over those are unrolled, and fill the registers


def turn(q: Tensor, k: Tensor, weight: Tensor, queries: int, keys: int) -> Turned:
    """What the kernels take of q (B, H, L, D), k (B, G, S, D) and weight (D,) or (H, D), for tiles of so many rows."""
    weight = weight.float().view(-1, weight.shape[-1])
    if weight.shape[0] > 1 and k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    D = q.shape[-1]
    more = -D % 4
    pad = torch.nn.functional.pad
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # No weight is below 2^-26 of the largest: less is lost than a float can hold of the sum.
    inverse = (largest / weight.abs()).clamp(max=2.0**26)
    unit = torch.where(weight < 0, -TWICE, TWICE).unsqueeze(-1)
    angle_q, angle_k = (pad(x.float().mT, (0, -x.shape[2] % n)) for x, n in ((q, queries), (k, keys)))
    # Past the width t is c, and its mean is the whole of 1 / c: nothing is left.
    power_q = pad(torch.exp2(angle_q * unit) * inverse.unsqueeze(-1), (0, 0, 0, more))
    power_k = pad(torch.exp2(angle_k * unit), (0, 0, 0, more))
    mean = pad(0.5 / inverse, (0, more), value=1.0).unflatten(-1, (-1, 2)).sum(-1)
    inverse = pad(inverse, (0, more), value=1.0)
    reach_q, reach_k = reach(angle_q, queries), reach(angle_k, keys)
    return Turned(
        weight.contiguous(), inverse.contiguous(), -mean.contiguous(), (-2.0 * largest).flatten(),
        torch.log2(inverse.amax(-1)), int(weight.shape[0] > 1), q.shape[1] // k.shape[1],
        power_q.contiguous(), power_k.contiguous(), angle_q.contiguous(), angle_k.contiguous(), reach_q, reach_k,
        D, D + more,
    )  # fmt: skip


def reach(angles: Tensor, rows: int) -> Tensor:
    """The largest size of an exponent in each tile of rows; infinity where tanh itself is to be taken."""
    size = angles.abs().amax(-2) * TWICE
    size = torch.where(size <= _REACH, size, torch.inf)  # NaN is none of them
    if angles.shape[-2] < _FEWEST:
        size = torch.full_like(size, torch.inf)
    return size.view(*size.shape[:-1], -1, rows).amax(-1)


@triton.jit
def sums(call, b, head, query, key):
    """The scores of a tile: `query` (queries,), `key` (keys,) and one head."""
    # The product of nothing: it lays the tile out as the matrix units do, where a thread has few rows and many columns, and
    # so few numbers to read for the sums that it takes.
    nothing = tl.zeros([query.shape[0], 16], tl.float16)
    total = tl.dot(nothing, tl.zeros([16, key.shape[0]], tl.float16))
    turned = call.words.turned
    own = head * turned.head
    row_q = b * call.sizes.H + head
    row_k = b * (call.sizes.H // turned.repeats) + head // turned.repeats
    tiles_q = tl.cdiv(call.sizes.L, call.form.queries)
    tiles_k = tl.cdiv(call.sizes.S, call.form.keys)
    # In whole tiles there is nothing to mask.
    long_q = tiles_q * call.form.queries
    long_k = tiles_k * call.form.keys
    reach_q = tl.load(turned.reach_q + row_q * tiles_q + query // call.form.queries)
    reach_k = tl.load(turned.reach_k + row_k * tiles_k + key // call.form.keys)
    reach = tl.max(reach_q, 0) + tl.max(reach_k, 0)
    if reach == float("inf"):
        q = turned.angle_q + row_q.to(tl.int64) * turned.width * long_q + query
        k = turned.angle_k + row_k.to(tl.int64) * turned.width * long_k + key
        for d in range(turned.width):
            angle = tl.load(q + d * long_q)[:, None] + tl.load(k + d * long_k)[None, :]
            value, _ = tanh(angle, call)
            total += tl.load(turned.weight + own * turned.width + d) * value
    else:
        q = turned.power_q + row_q.to(tl.int64) * turned.fours * long_q + query
        k = turned.power_k + row_k.to(tl.int64) * turned.fours * long_k + key
        if reach + tl.load(turned.smallest + own) < 28.0:
            for d in range(0, turned.fours, 4):
                total += _four(q, k, d, call, own, long_q, long_k, False)
        else:
            for d in range(0, turned.fours, 4):
                total += _four(q, k, d, call, own, long_q, long_k, True)
        total *= tl.load(turned.factor + own)
    return total


@triton.jit
def products(own, other, call, b, head, query, key):
    """The scores of a tile, before anything is done to them; `own` and `other` are rows of queries and keys."""
    if call.words.turned is not None:
        product = sums(call, b, head, query, key)
    else:
        product = times(own, tl.trans(other), call)
    return product


@triton.jit
def _term(q, k, d, c, long_q, long_k, bounded: tl.constexpr):
    t = tl.load(q + d * long_q)[:, None] * tl.load(k + d * long_k)[None, :] + c
    if bounded:
        t = tl.minimum(t, MOST)
    return t


@triton.jit
def _four(q, k, d, call, own, long_q, long_k, bounded: tl.constexpr):
    """Four fractions with one division."""
    turned = call.words.turned
    c = turned.inverse + own * turned.fours + d
    mean = turned.mean + (own * turned.fours + d) // 2
    t = _term(q, k, d, tl.load(c), long_q, long_k, bounded)
    u = _term(q, k, d + 1, tl.load(c + 1), long_q, long_k, bounded)
    v = _term(q, k, d + 2, tl.load(c + 2), long_q, long_k, bounded)
    w = _term(q, k, d + 3, tl.load(c + 3), long_q, long_k, bounded)
    tu = t * u
    vw = v * w
    first = tu * tl.load(mean) + (t + u)
    second = vw * tl.load(mean + 1) + (v + w)
    return (first * vw + second * tu) * reciprocal(tu * vw, call)
