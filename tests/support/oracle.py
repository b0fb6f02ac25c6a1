"""The reference implementation of attention: one batch row and one head at a time, in the precision of its inputs.

Tests run it in float64 for the reference, and in the precision of a backend for the baseline of error budgets. It
shares no code with the library. Gradients come from autograd.

    q (B, H, L, D)    k (B, G, S, D)    v (B, G, S, E)    allowed (B, H, L, S)    ->    out (B, H, L, E)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Scores of one head: q (L, D), k (S, D), index of the head, index of its key/value head -> (L, S).
Score = Callable[[Tensor, Tensor, int, int], Tensor]
# Weights of one head: s (L, S), index of the head -> (L, S).
Normalizer = Callable[[Tensor, int], Tensor]


def of_head(x: Any, head: int, axes: int = 0) -> Any:
    """Return the part of a parameter for one head: x[head] if x is a tensor with more than `axes` dimensions, else
    x.
    """
    return x[head] if isinstance(x, Tensor) and x.dim() > axes else x


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


def scaled_dot(q: Tensor, k: Tensor, h: int, g: int, scale: float | None = None) -> Tensor:
    return torch.einsum("id,jd->ij", q, k) * (1 / math.sqrt(max(q.shape[1], 1)) if scale is None else scale)


def dot(q: Tensor, k: Tensor, h: int, g: int) -> Tensor:
    return torch.einsum("id,jd->ij", q, k)


def cosine(q: Tensor, k: Tensor, h: int, g: int, temperature: Any = 1.0) -> Tensor:
    return torch.einsum("id,jd->ij", _unit(q), _unit(k)) / of_head(temperature, h)


def _unit(x: Tensor) -> Tensor:
    length = (x * x).sum(-1, keepdim=True)
    return x / torch.where(length == 0, 1.0, length).sqrt()


def bilinear(q: Tensor, k: Tensor, h: int, g: int, W: Tensor) -> Tensor:
    return torch.einsum("ia,ab,jb->ij", q, of_head(W, h, 2), k)


def gaussian(q: Tensor, k: Tensor, h: int, g: int, sigma: Any = 1.0) -> Tensor:
    return -((q[:, None] - k[None]) ** 2).sum(-1) / (2 * of_head(sigma, h) ** 2)


def distance(q: Tensor, k: Tensor, h: int, g: int, scale: float | None = None) -> Tensor:
    scale = 1 / math.sqrt(max(q.shape[1], 1)) if scale is None else scale
    return -((q[:, None] - k[None]) ** 2).sum(-1) * scale


def additive(
    q: Tensor,
    k: Tensor,
    h: int,
    g: int,
    v: Tensor,
    w_q: Tensor | None = None,
    w_k: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    q = q if w_q is None else torch.einsum("id,ad->ia", q, of_head(w_q, h, 2))
    k = k if w_k is None else torch.einsum("jd,ad->ja", k, of_head(w_k, g, 2))
    inner = q[:, None] + k[None]
    inner = inner if bias is None else inner + of_head(bias, h, 1)
    return torch.einsum("ija,a->ij", torch.tanh(inner), of_head(v, h, 1))


def gaussian_as_product(q: Tensor, k: Tensor, h: int, g: int, sigma: Any = 1.0) -> Tensor:
    q, k = _centered(q, k)
    return _distance_as_product(q / of_head(sigma, h), k / of_head(sigma, h), 0.5)


def distance_as_product(q: Tensor, k: Tensor, h: int, g: int, scale: float | None = None) -> Tensor:
    return _distance_as_product(*_centered(q, k), 1 / math.sqrt(max(q.shape[1], 1)) if scale is None else scale)


def _centered(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    center = torch.zeros_like(q[:1])
    if len(k):
        mean = k.detach().mean(0, keepdim=True)
        direction = mean / mean.square().sum().sqrt().clamp(min=1e-30)
        center = direction * torch.einsum("jd,d->j", k.detach(), direction[0]).min().clamp(min=0)
    return q - center, k - center


def _distance_as_product(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return 2 * scale * torch.einsum("id,jd->ij", q, k) - scale * (k * k).sum(-1) - scale * (q * q).sum(-1)[:, None]


SCORES: dict[str, Callable[..., Tensor]] = {
    "scaled_dot": scaled_dot,
    "dot": dot,
    "cosine": cosine,
    "bilinear": bilinear,
    "gaussian": gaussian,
    "distance": distance,
    "additive": additive,
}

# Baselines of scores that backends compute as a dot product: such a distance rounds at the size of |q|^2 and |k|^2 (of
# keys translated direction the origin) instead of |q - k|^2. This only changes the rounding; the float64 reference does
# not use it.
AS_PRODUCT: dict[str, Callable[..., Tensor]] = {"gaussian": gaussian_as_product, "distance": distance_as_product}


def one_by_one(pair: Callable[[Tensor, Tensor], Tensor]) -> Score:
    """Return a score from its formula for one query vector and one key vector."""

    def score(q: Tensor, k: Tensor, h: int, g: int) -> Tensor:
        if not len(q) or not len(k):
            return q.new_zeros(len(q), len(k))
        return torch.stack([torch.stack([pair(x, y).reshape(()) for y in k]) for x in q])

    return score


# ---------------------------------------------------------------------------------------------------------------------
# Normalizers of rows of scores, of which at least one is finite and others may be -inf.


def softmax(s: Tensor, h: int, sink: Any = None) -> Tensor:
    top = s.detach().amax(-1, keepdim=True)
    if sink is None:
        exponentials = (s - top).exp()
        return exponentials / exponentials.sum(-1, keepdim=True)
    sink = torch.as_tensor(of_head(sink, h), dtype=s.dtype)
    top = torch.maximum(top, sink.detach())
    exponentials = (s - top).exp()
    return exponentials / (exponentials.sum(-1, keepdim=True) + (sink - top).exp())


def sigmoid(s: Tensor, h: int, bias: Any = 0.0) -> Tensor:
    return torch.sigmoid(s + of_head(bias, h))


def sparsemax(s: Tensor, h: int) -> Tensor:
    """Martins, Astudillo (2016), algorithm 1: sort, and keep the scores above the threshold that they imply."""
    # Subtract the maximum, which changes no weight: then the threshold is no larger than the weights.
    s = s - s.detach().amax(-1, keepdim=True)
    size = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    down = s.sort(-1, descending=True).values
    # -inf sorts last, outside the support.
    total = torch.where(down > -math.inf, down, 0.0).cumsum(-1)
    support = (down > -math.inf) & (1 + size * down > total)
    count = support.sum(-1, keepdim=True)
    tau = (total.gather(-1, count - 1) - 1) / count
    # cumsum rounds at every step: in float64, the error of 131 weights was 70 units in the last place of their sum. (In
    # float32, torch accumulates in float64.) One correction step with the small residual removes this error.
    tau = tau + ((s - tau).clamp(min=0).sum(-1, keepdim=True) - 1) / count
    return (s - tau).clamp(min=0)


def entmax(s: Tensor, h: int, alpha: float = 1.5) -> Tensor:
    """Bisection for tau, then one differentiable step of Newton's method, which gives tau its exact gradient."""
    power = 1 / (alpha - 1)
    z = (alpha - 1) * s
    with torch.no_grad():
        high = z.amax(-1, keepdim=True)
        low = high - 1
        for _ in range(80):
            middle = (low + high) / 2
            above = ((z - middle).clamp(min=0) ** power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        slope = (power * (z - low).clamp(min=0) ** (power - 1) * (z > low)).sum(-1, keepdim=True)
    tau = low + (((z - low).clamp(min=0) ** power).sum(-1, keepdim=True) - 1) / slope
    return (z - tau).clamp(min=0) ** power


NORMALIZERS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sparsemax": sparsemax,
    "entmax": entmax,
}


# ---------------------------------------------------------------------------------------------------------------------
# Biases (H, L, S), from the number of positions of each key before its query.


def behind(L: int, S: int, align: str | int | None) -> list[list[int]]:
    """Return [i][j]: the number of positions of key j before query i, at key i ("start"), i + S - L ("end") or i + n
    (n).
    """
    first = {"start": 0, "end": S - L, None: 0}.get(align, align)  # type: ignore[arg-type]
    return [[first + i - j for j in range(S)] for i in range(L)]  # type: ignore[operator]


def alibi(H: int, steps: list[list[int]], slopes: Tensor | None, like: Tensor) -> Tensor:
    """Press, Smith, Lewis (2022): a penalty proportional to the distance, with a slope per head."""
    if slopes is None:
        slopes = torch.tensor(_alibi_slopes(H), dtype=torch.float64)
    far = torch.tensor([[abs(step) for step in row] for row in steps]).reshape(len(steps), -1).to(like.dtype)
    return torch.stack([-slope.to(like.dtype) * far for slope in slopes]) if H else far[None, :0]


def _alibi_slopes(H: int) -> list[float]:
    # "For n heads, our set of slopes is the geometric sequence that starts at 2^(-8/n) and uses that same value as its
    # ratio"; the authors' code extends it for other n by every second slope of the next power of two.
    if H & (H - 1) == 0:
        return [(2 ** (-8 / H)) ** (h + 1) for h in range(H)]
    power = 2 ** int(math.log2(H))
    return _alibi_slopes(power) + _alibi_slopes(2 * power)[0::2][: H - power]


def t5(steps: list[list[int]], table: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    """Raffel et al. (2020): a bias per bucket of distances and head, table (buckets, H)."""
    bucket = [[_t5_bucket(step, len(table), bidirectional, max_distance) for step in row] for row in steps]
    index = torch.tensor(bucket, dtype=torch.int64).reshape(len(steps), -1)
    return torch.stack([table[:, h][index] for h in range(table.shape[1])])


def _t5_bucket(step: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    start, far = 0, max(step, 0)
    if bidirectional:
        buckets //= 2
        start, far = (buckets if step < 0 else 0), abs(step)
    exact = buckets // 2
    if far < exact:
        return start + far
    # exact + floor(log(far / exact) / log(max_distance / exact) * rest), in integers: the most steps m with
    # (max_distance / exact)^(m / rest) <= far / exact.
    rest = buckets - exact
    steps = 0
    while steps < rest - 1 and max_distance ** (steps + 1) * exact ** (rest - steps - 1) <= far**rest:
        steps += 1
    return start + exact + steps


# ---------------------------------------------------------------------------------------------------------------------
# Dropout.

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(x: int) -> int:
    """lowbias32 of Chris Wellons, "Prospecting for Hash Functions" (2018)."""
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK
    return x ^ x >> 16


def keep(B: int, H: int, L: int, S: int, seed: int, rate: float) -> Tensor:
    """Return which weights dropout keeps, bool (B, H, L, S), with 32-bit integer arithmetic."""
    keep_mask = torch.zeros(B, H, L, S, dtype=torch.bool)
    threshold = min(round(rate * 2**32), 2**32 - 1)
    if rate >= 1:
        return keep_mask
    for b in range(B):
        for h in range(H):
            for i in range(L):
                row = _mix((seed ^ _GOLDEN) & _MASK)
                for part in (seed >> 32, b, h, i):
                    row = _mix((row * _GOLDEN ^ part) & _MASK)
                factor = _mix(row ^ _GOLDEN) | 1
                hashes = [_mix((j + row) * factor & _MASK) for j in range(S)]
                keep_mask[b, h, i] = torch.tensor([x >= threshold for x in hashes], dtype=torch.bool)
    return keep_mask


# ---------------------------------------------------------------------------------------------------------------------
# The equation.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score,
    normalizer: Normalizer = softmax,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    keep_mask: Tensor | None = None,
    rate: float = 0.0,
    sink: Any = None,
    top: int = 0,
    member: Tensor | None = None,
    rows: Sequence[int] = (),
    noise: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the output and all summaries by name, and the masked `scores` (B, H, L, S) and `bias` (B, H, L, S).

    `bias` broadcasts to (B, H, L, S). `keep_mask` (B, H, L, S) are the weights that dropout keeps. `sink` is that of
    the normalizer, for the log-sum-exp. `member` (B, N, S) are groups of keys. `noise` perturbs the scores.
    """
    (B, H, L, _), (G, S), E = q.shape, k.shape[1:3], v.shape[3]
    allowed = torch.ones(B, H, L, S, dtype=torch.bool) if allowed is None else allowed
    bias = None if bias is None else bias.to(q.dtype).expand(B, H, L, S)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("out", "lse", "full", "scores")}
    for b in range(B):
        for h in range(H):
            g = h * G // H
            s = score(q[b, h], k[b, g], h, g)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            s = s if bias is None else s + bias[b, h]
            s = s if noise is None else noise(s)
            s = torch.where(allowed[b, h], s, -math.inf)
            present = s > -math.inf
            any_present = present.any(-1, keepdim=True)
            p = s
            if S:
                p = normalizer(torch.where(any_present, s, 0.0), h)
                p = torch.where(any_present & present, p, 0.0)
            dropped = (
                p if keep_mask is None else torch.where(keep_mask[b, h], p, 0.0) * (1 / (1 - rate) if rate < 1 else 0.0)
            )
            parts["out"].append(torch.einsum("ij,je->ie", dropped, v[b, g]))
            parts["lse"].append(_log_sum_exp(s, of_head(sink, h)))
            parts["full"].append(p)
            parts["scores"].append(s)
    shapes = {"out": (B, H, L, E), "lse": (B, H, L), "full": (B, H, L, S), "scores": (B, H, L, S)}
    results = {n: torch.stack(x).reshape(shapes[n]) if x else q.new_zeros(shapes[n]) for n, x in parts.items()}
    if bias is not None:
        results["bias"] = bias
    p = results["full"]
    results["max"] = p.amax(-1) if S else p.new_zeros(B, H, L)
    results["entropy"] = -torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0).sum(-1)
    results["received"] = p.sum(2)
    results["rows"] = p[:, :, list(rows)]
    if member is not None:
        results["mass"] = torch.einsum("bhij,bnj->bhin", p, member.to(p.dtype))
    if top:
        best = p.sort(-1, descending=True).values[..., :top]
        results["top_weights"] = torch.nn.functional.pad(best, (0, top - best.shape[-1]))
    return results


def _log_sum_exp(s: Tensor, sink: Any) -> Tensor:
    """Return the log-sum-exp over the last dimension, including a sink; -inf if all scores are -inf."""
    if sink is not None:
        s = torch.cat([s, torch.as_tensor(sink, dtype=s.dtype).expand(len(s), 1)], 1)
    if not s.shape[1]:
        return s.new_full((len(s),), -math.inf)
    top = s.detach().amax(-1, keepdim=True)
    any_present = top > -math.inf
    total = torch.where(any_present, s - torch.where(any_present, top, 0.0), 0.0).exp().sum(-1)
    return torch.where(any_present[:, 0], total.log() + torch.where(any_present, top, 0.0)[:, 0], -math.inf)


def kinks(results: dict[str, Tensor], margin: float, alpha: float | None = None, top: int = 0) -> dict[str, Tensor]:
    """Return the rows (B, H, L) close to a jump of a derivative, where rounding decides which side a backend is on.

    "max" and "top": two of the largest scores differ by less than `margin`. "weights": a score lies within `margin` of
    the threshold of entmax.
    """
    s, p = results["scores"].detach(), results["full"].detach()
    no_rows = torch.zeros(s.shape[:3], dtype=torch.bool)
    if not s.shape[-1]:
        return {"max": no_rows, "top": no_rows, "weights": no_rows}
    best = s.sort(-1, descending=True).values
    close = (best[..., :-1] - best[..., 1:]) < margin
    rows = {"max": close[..., :1].any(-1), "top": close[..., :top].any(-1), "weights": no_rows}
    if alpha is not None:
        # On the support, p = gap^(1 / (alpha - 1)) with gap = (alpha - 1) s - tau.
        gap = torch.where(p > 0, p, 1.0) ** (alpha - 1)
        z = (alpha - 1) * s
        tau = torch.where(p > 0, z - gap, -math.inf).amax(-1, keepdim=True)
        rows["weights"] = ((z - tau).abs() < margin).any(-1)
    return rows
