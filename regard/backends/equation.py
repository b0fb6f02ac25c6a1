"""The three stages in plain PyTorch, for some rows of the score matrix and all the keys that they may attend to.

    score -> normalize -> aggregate

`reference` calls this for all rows at once, `tiled` for a few rows at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.backends.dropout import keep
from regard.components.function import FunctionScore
from regard.components.normalizer import Softmax
from regard.components.tensor_ops import fold_heads, log_sum_exp
from regard.components.tile import Range, Tile
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


def concat_ranges(columns: Sequence[Range], part: Callable[[Range], Tensor]) -> Tensor:
    """Concatenate what `part` returns for each range of keys, along the last axis."""
    parts = [part(keys) for keys in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


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
    summary = plan.summary
    results: dict[str, Tensor] = {"full": p}
    if "out" in names or "dropped" in names:
        dropped = p
        if plan.dropout:
            seed = plan.seed
            where = concat_ranges(columns, lambda k: keep(dataclasses.replace(tile, k=k), seed, plan.dropout))
            dropped = p * where * (1 / (1 - plan.dropout) if plan.dropout < 1 else 0.0)
        results["dropped"] = dropped
    if "out" in names:
        results["out"] = (fold_heads(dropped, v) @ v).view(*p.shape[:-1], v.shape[-1])
    if "lse" in names:
        lse = log_sum_exp(s)
        lse = lse if empty is None else lse.masked_fill(empty[..., 0], -math.inf)
        results["lse"] = plan.normalizer.total(lse, tile) if isinstance(plan.normalizer, Softmax) else lse
    if "max" in names:
        results["max"] = p.amax(-1)
    if "entropy" in names:
        # Replacing 0 by 1 inside the log keeps the gradient finite.
        results["entropy"] = -(p * torch.log(torch.where(p > 0, p, 1.0))).sum(-1)
    if "received" in names:
        results["received"] = p.sum(-2)
    if "mass" in names:
        assert summary.mass is not None
        member = summary.mass if summary.mass.dim() == 3 else summary.mass[None]
        member = (member[slice(*tile.b)] if member.shape[0] > 1 else member)[:, None]
        results["mass"] = p @ concat_ranges(columns, lambda k: member[..., slice(*k)]).to(p.dtype).mT
    if "rows" in names:
        results["rows"] = p[..., requested_rows(plan, tile)[1], :]
    if "top_weights" in names or "top_keys" in names:
        results["top_weights"], results["top_keys"] = _top(summary.top, p, s, empty, columns)
    return [results[name] for name in names]


def _top(k: int, p: Tensor, s: Tensor, empty: Tensor | None, columns: Sequence[Range]) -> tuple[Tensor, Tensor]:
    # Weights increase with scores, so the largest scores have the largest weights. Unlike weights, scores also distinguish a
    # pair that may not attend (-inf) from one whose weight is 0.
    best, index = s.detach().topk(min(k, s.shape[-1]), -1)
    absent = best == -math.inf
    absent = absent if empty is None else absent | empty
    keys = concat_ranges(columns, lambda c: torch.arange(*c, device=s.device))[index].masked_fill(absent, -1)
    weights = p.gather(-1, index)
    missing = k - index.shape[-1]
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing))
        keys = torch.nn.functional.pad(keys, (0, missing), value=-1)
    return weights, keys


def requested_rows(plan: Plan, tile: Tile) -> tuple[list[int], list[int]]:
    """Return which rows of `Summary(rows=...)` lie in a tile: their indices in the summary, and in the tile."""
    indices, rows = [], []
    for index, row in enumerate(plan.summary.row_numbers):
        row = row + tile.sizes.L if row < 0 else row
        if tile.q[0] <= row < tile.q[1]:
            indices.append(index)
            rows.append(row - tile.q[0])
    return indices, rows
