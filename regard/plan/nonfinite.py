"""Nonfinite values under a mask: the one policy of all backends.

What is masked out reaches no output and no gradient, not even NaN or inf. A product cannot give that by itself, since 0 * NaN
is NaN. There are two ways:

- The backend masks nonfinite values itself (`Backend.masks_nonfinite`), and gets q, k and v as they are.
- For every other backend the problem holds flags, which queries (B, H, L) and keys or values (B, G, S) are nonfinite. Products
  see zeros there (`zero_nonfinite`), and the scores of pairs that may attend are NaN (`nan_scores`), so that a row that
  attends to a nonfinite key, or whose query is nonfinite, is NaN.

Without a mask nothing is looked for: arithmetic gives the same result.
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

# Whether q, k and v hold neither NaN nor inf; False where that is not known.
AllFinite = Callable[[Tensor, Tensor, Tensor], bool]
# Scores that take q and k as they are. Every other score would spread a nonfinite value before a backend sees it.
_UNREDUCED_SCORES = (ScaledDot, Dot)


def can_be_left(score: Any) -> bool:
    """Whether a score leaves nonfinite values where they are, for a backend that masks them itself."""
    return score is None or type(score) in _UNREDUCED_SCORES


def find(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which vectors of q (..., L, D), k (..., S, D) and v (..., S, E) hold NaN or inf."""
    found_q, found_k, found_v = (_holds_nonfinite(x.detach()) for x in (q, k, v))
    return found_q, found_k, found_v


def clear(score: Any, tensors: Sequence[Tensor], found: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return q, k and v with zeros where nonfinite values were found, if the score would spread them."""
    if type(score) in _UNREDUCED_SCORES:
        return tensors
    return [x.masked_fill(flags[..., None], 0.0) for x, flags in zip(tensors, found, strict=True)]


def flag_nonfinite(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Plan, Sequence[Tensor]]:
    """Return the problem with flags at its nonfinite values, for a backend that does not mask these itself."""
    if plan.mask is None or plan.nonfinite_q is not None:
        return plan, tensors
    found_q, found_k, found_v = find(*tensors[:3])
    plan = replace(plan, nonfinite_q=Slot(len(tensors)), nonfinite_k=Slot(len(tensors) + 1))
    return plan, (*tensors, found_q, found_k | found_v)


def zero_nonfinite(plan: Plan, tensors: Sequence[Tensor], values: Sequence[Any] | None = None) -> Sequence[Any]:
    """Return the tensors of a problem with zeros for the queries, keys and values that are flagged.

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
    """Return the output (B, H, L, E) of a causal mask, query 0 beside key 0, with NaN in the rows that attend to what is flagged.

    The plan is filled; `keys` is S.
    """
    if plan.nonfinite_q is None:
        return out
    last = torch.arange(out.shape[2], device=out.device).clamp(max=keys - 1)
    reached = plan.nonfinite_k.cumsum(-1)[..., last] > 0
    reached = reached.repeat_interleave(out.shape[1] // reached.shape[1], 1) | plan.nonfinite_q
    return out.masked_fill(reached[..., None], torch.nan)


def any_flagged(plan: Plan, tensors: Sequence[Tensor]) -> bool:
    """Whether any flag of a problem is set. Reads values of tensors."""
    if plan.nonfinite_q is None:
        return False
    return any(bool(tensors[slot.index].any()) for slot in (plan.nonfinite_q, plan.nonfinite_k))


def are_finite(tensors: Sequence[Tensor], quick: AllFinite | None) -> bool:
    """Whether q, k and v hold neither NaN nor inf; False where that is not cheap to know.

    `quick` is asked first. Then one sum per tensor decides, since NaN and inf stay in it; a sum that overflows returns False,
    which costs time and nothing else.
    """
    if quick is not None and quick(*tensors):
        return True
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return False
    try:
        return all(math.isfinite(float(x.detach().sum())) for x in tensors)
    except RuntimeError:  # inside torch.func.vmap no value can be read
        return False


def _holds_nonfinite(x: Tensor) -> Tensor:
    """Which vectors (..., D) hold NaN or inf. The largest absolute value decides: one pass, where asking each element takes
    three.
    """
    if not x.shape[-1]:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    size: Tensor = torch.linalg.vector_norm(x, torch.inf, -1)
    return ~size.isfinite()
