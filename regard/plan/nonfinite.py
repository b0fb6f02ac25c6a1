"""Nonfinite values under a mask: the policy of all backends.

Masked keys and values must not reach an output or a gradient, not even if they are NaN or inf. Matrix products alone do
not guarantee this, since 0 * NaN is NaN. There are two ways:

- The backend masks nonfinite values itself (`Backend.masks_nonfinite`), and gets q, k and v unchanged.
- For other backends, the problem has flags of the queries (B, H, L) and the keys or values (B, G, S) that are
  nonfinite. These are replaced by zeros in products (`zero_nonfinite`), and the scores of their unmasked pairs are NaN
  (`nan_scores`), so that rows that attend to a nonfinite key or value, or whose query is nonfinite, are NaN.

Calls without a mask are not checked: plain arithmetic gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.components.component import Slot
from regard.components.score import Dot, ScaledDot
from regard.components.tensor_ops import expand_heads
from regard.components.tile import Tile
from regard.plan.problem import Plan
from regard.tracing import has_values

# Whether q, k and v contain neither NaN nor inf; False if unknown.
AllFinite = Callable[[Tensor, Tensor, Tensor], bool]
# Scores that use q and k unchanged. Other scores propagate nonfinite values before a backend sees them.
_UNREDUCED_SCORES = (ScaledDot, Dot)


def can_be_left(score: Any) -> bool:
    """Return whether a score does not propagate nonfinite values, so that a backend can mask them itself."""
    return score is None or type(score) in _UNREDUCED_SCORES


def find(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which vectors of q (..., L, D), k (..., S, D) and v (..., S, E) contain NaN or inf."""
    is_nonfinite_q, is_nonfinite_k, is_nonfinite_v = (_has_nonfinite(x.detach()) for x in (q, k, v))
    return is_nonfinite_q, is_nonfinite_k, is_nonfinite_v


def clear(score: Any, tensors: Sequence[Tensor], flags_qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    """Replace nonfinite vectors of q, k and v by zeros if the score would propagate them."""
    if type(score) in _UNREDUCED_SCORES:
        return tensors
    return [x.masked_fill(flags[..., None], 0.0) for x, flags in zip(tensors, flags_qkv, strict=True)]


def flag_nonfinite(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Plan, Sequence[Tensor]]:
    """Return the problem with flags of its nonfinite values, for a backend that does not mask these itself."""
    if plan.mask is None or plan.nonfinite_q is not None:
        return plan, tensors
    is_nonfinite_q, is_nonfinite_k, is_nonfinite_v = find(*tensors[:3])
    plan = replace(plan, nonfinite_q=Slot(len(tensors)), nonfinite_k=Slot(len(tensors) + 1))
    return plan, (*tensors, is_nonfinite_q, is_nonfinite_k | is_nonfinite_v)


def without_flags(plan: Plan, tensors: Sequence[Tensor]) -> Plan:
    """Return the plan without flags if none is set: plain arithmetic is faster. Reads values of tensors."""
    if plan.nonfinite_q is None or any_flagged(plan, tensors):
        return plan
    return replace(plan, nonfinite_q=None, nonfinite_k=None)


def zero_nonfinite(plan: Plan, tensors: Sequence[Tensor], values: Sequence[Any] | None = None) -> Sequence[Any]:
    """Return the tensors of a problem with zeros in flagged queries, keys and values.

    With `values`, such as gradients of the tensors, these are returned with the same zeros instead; each may be None.
    """
    if plan.nonfinite_q is None:
        return tensors if values is None else values
    q_flags, k_flags = (tensors[slot.index][..., None] for slot in (plan.nonfinite_q, plan.nonfinite_k))
    values = tensors if values is None else values
    zeroed = [
        None if x is None else x.masked_fill(flags, 0.0)
        for x, flags in zip(values, (q_flags, k_flags, k_flags), strict=False)
    ]
    return *zeroed, *values[3:]


def nan_scores(plan: Plan, s: Tensor, tile: Tile) -> Tensor:
    """Return the scores of a tile with NaN where the query, the key or its value is flagged. The plan is filled."""
    if plan.nonfinite_q is None:
        return s
    k_flags = plan.nonfinite_k[slice(*tile.b), slice(*tile.g), slice(*tile.k)]
    k_flags = expand_heads(k_flags, (tile.h[1] - tile.h[0]) // max(k_flags.shape[1], 1))
    q_flags = plan.nonfinite_q[slice(*tile.b), slice(*tile.h), slice(*tile.q)]
    return s.masked_fill(q_flags[..., :, None] | k_flags[..., None, :], math.nan)


def nan_causal_rows(plan: Plan, out: Tensor, keys: int) -> Tensor:
    """Set rows of the output (B, H, L, E) that attend to flagged keys to NaN, for a causal mask with query 0 at key 0.

    The plan is filled; `keys` is S.
    """
    if plan.nonfinite_q is None:
        return out
    last = torch.arange(out.shape[2], device=out.device).clamp(max=keys - 1)
    reached = plan.nonfinite_k.cumsum(-1)[..., last] > 0
    reached = reached.repeat_interleave(out.shape[1] // reached.shape[1], 1) | plan.nonfinite_q
    return out.masked_fill(reached[..., None], torch.nan)


def any_flagged(plan: Plan, tensors: Sequence[Tensor]) -> bool:
    """Return whether any flag of a problem is set. Reads values of tensors."""
    if plan.nonfinite_q is None:
        return False
    return any(bool(tensors[slot.index].any()) for slot in (plan.nonfinite_q, plan.nonfinite_k))


def are_finite(tensors: Sequence[Tensor], quick: AllFinite | None, is_eager: bool) -> bool:
    """Return whether q, k and v contain neither NaN nor inf; False if that is expensive to determine.

    `quick` is tried first, then one sum per tensor, which NaN and inf propagate to. If a sum overflows, the result is
    False; this costs time, but changes no result.
    """
    if not is_eager and not has_values(*tensors):
        return False
    if quick is not None and quick(*tensors):
        return True
    return tensors[0].device.type == "cpu" and all(math.isfinite(float(x.detach().sum())) for x in tensors)


def _has_nonfinite(x: Tensor) -> Tensor:
    """Return which vectors (..., D) contain NaN or inf, by their largest absolute value: one pass instead of three."""
    if not x.shape[-1]:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    size: Tensor = torch.linalg.vector_norm(x, torch.inf, -1)
    return ~size.isfinite()
