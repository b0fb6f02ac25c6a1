"""Additive scores on the GPU, s = sum_d w_d tanh(q_d + k_d), without L x S x D evaluations of tanh.

    w tanh(x) = w - 2 w / (1 + e^2x)        e^2x = e^2q e^2k: (L + S) D exponentials instead of L S D

With the sign of w moved into x, the score is, up to a constant, a sum of fractions 1 / t, where c = 1 / |w| and
t = c + (c e^2q) e^2k. Four fractions share one division. Each pair of fractions is centered: its value where tanh is 0
is subtracted from the numerator before the division. The CPU kernels use the same formula: csrc/additive.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.score import matmul, reciprocal, tanh

TWO_LOG2E = 2.8853900817779268
# e^2q and e^2k leave the range of float32 beyond |x| = 30. A sum of fewer than eight fractions has 3 to 6 times the
# error of tanh. In both cases the kernels compute tanh itself.
_MAX_EXPONENT = 30.0 * TWO_LOG2E
_MIN_LENGTH = 8
# Beyond 2^29, 1 / t is negligible, and the product of four values of t overflows.
_MAX_T: tl.constexpr = tl.constexpr(2.0**29)


class AdditiveInputs(NamedTuple):
    """Inputs of an additive score, prepared for the kernels. Exponents are those of powers of 2.

    L and S are padded to whole tiles, so that loads need no mask; D4 is D padded to a multiple of 4. `D` and
    `D_padded4` are no constants: loops over constants are unrolled and fill the registers.
    """

    weight: Any  # (heads, D)
    c: Any  # (heads, D4): 1 / |w|, in units of the largest weight
    negative_mean: Any  # (heads, D4 / 2): minus the sum of each pair of 1 / t where tanh is 0
    factor: Any  # (heads,): -2 times the largest |w|
    log2_max_c: Any  # (heads,)
    head_stride: Any  # 1 if each head has weights of its own, else 0
    repeats: Any  # query heads per head of exp_k: 1 where each head has weights of its own
    exp_q: Any  # (B, H, D4, L): c e^2q
    exp_k: Any  # (B, G|H, D4, S): e^2k
    q: Any  # (B, H, D, L)
    k: Any  # (B, G|H, D, S)
    max_exponent_q: Any  # (B, H, tiles)
    max_exponent_k: Any  # (B, G|H, tiles)
    D: Any
    D_padded4: Any


def prepare(q: Tensor, k: Tensor, weight: Tensor, queries: int, keys: int) -> AdditiveInputs:
    """Prepare q (B, H, L, D), k (B, G, S, D) and weight (D,) or (H, D), for tiles of `queries` by `keys`."""
    weight = weight.float().view(-1, weight.shape[-1])
    if weight.shape[0] > 1 and k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    D = q.shape[-1]
    padding = -D % 4
    pad = torch.nn.functional.pad
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # Weights are at least 2^-26 of the largest: the difference is below the precision of the sum.
    c = (largest / weight.abs()).clamp(max=2.0**26)
    unit = torch.where(weight < 0, -TWO_LOG2E, TWO_LOG2E).unsqueeze(-1)
    q_t, k_t = (pad(x.float().mT, (0, -x.shape[2] % n)) for x, n in ((q, queries), (k, keys)))
    # In the padding t = c = 1 and the mean of 1 / t is 1, so that the difference is 0.
    exp_q = pad(torch.exp2(q_t * unit) * c.unsqueeze(-1), (0, 0, 0, padding))
    exp_k = pad(torch.exp2(k_t * unit), (0, 0, 0, padding))
    mean = pad(0.5 / c, (0, padding), value=1.0).unflatten(-1, (-1, 2)).sum(-1)
    c = pad(c, (0, padding), value=1.0)
    return AdditiveInputs(
        weight.contiguous(), c.contiguous(), -mean.contiguous(), (-2.0 * largest).flatten(),
        torch.log2(c.amax(-1)), int(weight.shape[0] > 1), q.shape[1] // k.shape[1],
        exp_q.contiguous(), exp_k.contiguous(), q_t.contiguous(), k_t.contiguous(),
        max_exponents(q_t, queries), max_exponents(k_t, keys), D, D + padding,
    )  # fmt: skip


def max_exponents(x: Tensor, rows: int) -> Tensor:
    """Return the largest absolute exponent in each tile of `rows` columns of x; inf where tanh itself is computed.

    >>> from regard.backends.triton.additive_score import max_exponents
    >>> x = torch.tensor([1.0, -2.0, 3.0, 40.0]).expand(8, 4)
    >>> (max_exponents(x, rows=2) / max_exponents(x, rows=1)[0]).tolist()  # |x| up to 2; beyond 30
    [2.0, inf]
    """
    largest = x.abs().amax(-2) * TWO_LOG2E
    largest = torch.where(largest <= _MAX_EXPONENT, largest, torch.inf)  # NaN becomes inf, too
    if x.shape[-2] < _MIN_LENGTH:
        largest = torch.full_like(largest, torch.inf)
    return largest.view(*largest.shape[:-1], -1, rows).amax(-1)


@triton.jit
def additive_scores(args, b, head, query, key):
    """The scores of a tile: `query` (queries,), `key` (keys,) and one head."""
    # This product of zeros gives the tile the layout of the matrix units. In it a thread has few rows and many columns,
    # and so loads few values for its sums.
    zeros = tl.zeros([query.shape[0], 16], tl.float16)
    total = tl.dot(zeros, tl.zeros([16, key.shape[0]], tl.float16))
    inputs = args.score.additive
    w_head = head * inputs.head_stride
    row_q = b * args.sizes.H + head
    row_k = b * (args.sizes.H // inputs.repeats) + head // inputs.repeats
    tiles_q = tl.cdiv(args.sizes.L, args.config.queries)
    tiles_k = tl.cdiv(args.sizes.S, args.config.keys)
    padded_L = tiles_q * args.config.queries
    padded_S = tiles_k * args.config.keys
    max_exponent_q = tl.load(inputs.max_exponent_q + row_q * tiles_q + query // args.config.queries)
    max_exponent_k = tl.load(inputs.max_exponent_k + row_k * tiles_k + key // args.config.keys)
    max_exponent = tl.max(max_exponent_q, 0) + tl.max(max_exponent_k, 0)
    if max_exponent == float("inf"):
        q = inputs.q + row_q.to(tl.int64) * inputs.D * padded_L + query
        k = inputs.k + row_k.to(tl.int64) * inputs.D * padded_S + key
        for d in range(inputs.D):
            x = tl.load(q + d * padded_L)[:, None] + tl.load(k + d * padded_S)[None, :]
            value, _ = tanh(x, args)
            total += tl.load(inputs.weight + w_head * inputs.D + d) * value
    else:
        q = inputs.exp_q + row_q.to(tl.int64) * inputs.D_padded4 * padded_L + query
        k = inputs.exp_k + row_k.to(tl.int64) * inputs.D_padded4 * padded_S + key
        if max_exponent + tl.load(inputs.log2_max_c + w_head) < 28.0:
            for d in range(0, inputs.D_padded4, 4):
                total += _sum_of_four(q, k, d, args, w_head, padded_L, padded_S, False)
        else:
            for d in range(0, inputs.D_padded4, 4):
                total += _sum_of_four(q, k, d, args, w_head, padded_L, padded_S, True)
        total *= tl.load(inputs.factor + w_head)
    return total


@triton.jit
def raw_scores(q_tile, k_tile, args, b, head, query, key):
    """The scores of a tile before scale, softcap and biases. Additive scores read their own inputs, not the tiles."""
    if args.score.additive is not None:
        raw = additive_scores(args, b, head, query, key)
    else:
        raw = matmul(q_tile, tl.trans(k_tile), args)
    return raw


@triton.jit
def _denominator(q, k, d, c, padded_L, padded_S, bounded: tl.constexpr):
    t = tl.load(q + d * padded_L)[:, None] * tl.load(k + d * padded_S)[None, :] + c
    if bounded:
        t = tl.minimum(t, _MAX_T)
    return t


@triton.jit
def _sum_of_four(q, k, d, args, w_head, padded_L, padded_S, bounded: tl.constexpr):
    """The sum of four centered fractions, with one division."""
    inputs = args.score.additive
    c = inputs.c + w_head * inputs.D_padded4 + d
    negative_mean = inputs.negative_mean + (w_head * inputs.D_padded4 + d) // 2
    t = _denominator(q, k, d, tl.load(c), padded_L, padded_S, bounded)
    u = _denominator(q, k, d + 1, tl.load(c + 1), padded_L, padded_S, bounded)
    v = _denominator(q, k, d + 2, tl.load(c + 2), padded_L, padded_S, bounded)
    w = _denominator(q, k, d + 3, tl.load(c + 3), padded_L, padded_S, bounded)
    tu = t * u
    vw = v * w
    first = tu * tl.load(negative_mean) + (t + u)
    second = vw * tl.load(negative_mean + 1) + (v + w)
    return (first * vw + second * tu) * reciprocal(tu * vw, args)
