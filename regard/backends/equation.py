"""The three stages in plain PyTorch, for some rows of the score matrix and all the keys that they may attend to.

    score -> normalize -> aggregate

`reference` calls this for all rows at once, `tiled` for a few rows at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.backends.dropout import keep
from regard.components.function import FunctionScore
from regard.components.statistic import BUILT_IN, Statistic, Weights
from regard.components.tensor_ops import fold_heads
from regard.components.tile import Range, Tile, concat_ranges
from regard.plan.nonfinite import nan_scores
from regard.plan.problem import Plan


def scores(plan: Plan, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Stage 1, before the mask: q (b, h, l, D), k (b, g, s, D) -> (b, h, l, s)."""
    s = plan.score.scores(q, k, tile)
    if plan.softcap is not None:
        s = torch.tanh(s / plan.softcap) * plan.softcap
    if plan.bias is not None:
        s = s + plan.bias.bias(tile, s.dtype)
    return s


def masked_scores(plan: Plan, s: Tensor, tile: Tile) -> Tensor:
    """Return the scores of a tile with -inf where a pair may not attend."""
    s = nan_scores(plan, s, tile)
    return s if plan.mask is None else s.masked_fill(~plan.mask.allowed(tile), -math.inf)


def can_be_empty(plan: Plan) -> bool:
    """Whether a row may have nothing to attend to."""
    return plan.mask is not None or plan.bias is not None or isinstance(plan.score, FunctionScore)


def aggregate(
    plan: Plan, s: Tensor, v: Tensor, tile: Tile, columns: Sequence[Range], names: Sequence[str], empty: Tensor | None
) -> list[Tensor]:
    """Stages 2 and 3, and the summaries.

    Args:
        s: masked scores of whole rows (b, h, l, w), w keys that lie in `columns`.
        v: the values of these keys (b, g, w, E).
        tile: the rows; its keys span the columns.
        names: outputs, as in `Plan.outputs`, or "dropped" for the weights after dropout.
        empty: (b, h, l, 1), the rows that may attend to nothing; None if there are none.

    Returns:
        These outputs, in order. An axis of keys has w elements.
    """
    if empty is not None:
        s = s.masked_fill(empty, 0.0)
    p = plan.normalizer.weights(s, tile)
    if empty is not None:
        p = p.masked_fill(empty, 0.0)
    if plan.nonfinite_q is not None:
        # A row that attends to NaN is NaN, except where it may not attend: no gradient flows there.
        p = p.masked_fill(s == -math.inf, 0.0)
    weights = Weights(p, s, columns, empty, tile, plan.normalizer)
    statistics = {statistic.name: statistic for statistic in plan.summary.statistics}
    dropped = _dropped(plan, p, tile, columns) if "out" in names or "dropped" in names else p
    results = []
    for name in names:
        if name == "out":
            results.append((fold_heads(dropped, v) @ v).view(*p.shape[:-1], v.shape[-1]))
        elif name == "dropped":
            results.append(dropped)
        else:
            results.append(_compute(statistics[name], weights))
    return results


def _dropped(plan: Plan, p: Tensor, tile: Tile, columns: Sequence[Range]) -> Tensor:
    """Return the weights after dropout."""
    if not plan.dropout:
        return p
    seed = plan.seed
    where = concat_ranges(columns, lambda k: keep(dataclasses.replace(tile, k=k), seed, plan.dropout, plan.origin))
    return p * where * (1 / (1 - plan.dropout) if plan.dropout < 1 else 0.0)


def _compute(statistic: Statistic, weights: Weights) -> Tensor:
    """Compute a statistic. Those of users are checked, and get their value where nothing may be attended to."""
    if isinstance(statistic, BUILT_IN):
        return statistic.compute(weights)
    result = statistic.compute(weights)
    b, h, length, w = weights.p.shape
    known = {"B": b, "H": h, "L": length, "S": w}
    expected = tuple([
        known[axis] if axis in known
        else len(statistic.rows_in(weights.tile)[0]) if axis == "R" else statistic.size(axis)
        for axis in statistic.axes
    ])  # fmt: skip
    if result.shape != expected:
        raise ValueError(
            f"summary: {statistic.name} of some queries has shape {tuple(result.shape)}; expected {expected} "
            f"for its axes {statistic.axes}"
        )
    if "L" not in statistic.axes:
        return result
    if "S" in statistic.axes:
        masked = weights.scores == -math.inf
        masked = masked if weights.empty is None else masked | weights.empty
        return result.masked_fill(masked, statistic.empty)
    if weights.empty is None or statistic.includes_sink:
        return result
    return result.masked_fill(weights.empty.view(b, h, length, *[1] * (result.dim() - 3)), statistic.empty)
