"""The equation, for one strip: some rows of queries, and all the keys that they may attend to.

    score -> normalise -> aggregate

The kernels in plain PyTorch are this file at two sizes: `reference` takes the whole problem as one strip, `tiled` takes
a few rows at a time.
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


def forbid(plan: Plan, s: Tensor, tile: Tile) -> Tensor:
    """The scores of a tile with the mask applied: -inf where a pair may not attend."""
    s = nan_scores(plan, s, tile)
    return s if plan.mask is None else s.masked_fill(~plan.mask.allowed(tile), -math.inf)


def over(columns: Sequence[Range], part: Callable[[Range], Tensor]) -> Tensor:
    """Lay what `part` gives for each range of keys side by side."""
    parts = [part(columns_) for columns_ in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def can_be_empty(plan: Plan) -> bool:
    """May a row be left with nothing to attend to?"""
    return plan.mask is not None or plan.bias is not None or isinstance(plan.score, FunctionScore)


def finish(
    plan: Plan, s: Tensor, v: Tensor, tile: Tile, columns: Sequence[Range], wanted: Sequence[str], empty: Tensor | None
) -> list[Tensor]:
    """Stages 2 and 3, and the summaries.

    Args:
        s: masked scores of whole rows (b, h, l, w), w keys that lie in `columns`.
        v: the values of these keys (b, g, w, E).
        tile: the rows; its keys span the columns.
        wanted: names of outputs, as in `Plan.outputs`, or "kept" for the weights after dropout.
        empty: (b, h, l, 1), the rows that may attend to nothing; None if there are none.

    Returns:
        The outputs asked for, in order; what has an axis of keys has w of them.
    """
    if empty is not None:
        s = s.masked_fill(empty, 0.0)
    p = plan.normalizer.weights(s, tile)
    if empty is not None:
        p = p.masked_fill(empty, 0.0)
    if plan.nonfinite_q is not None:
        # A row that attends to NaN is NaN, but not where it may not attend: nothing flows back there.
        p = p.masked_fill(s == -math.inf, 0.0)
    summary = plan.summary
    results: dict[str, Tensor] = {"full": p}
    if "out" in wanted or "kept" in wanted:
        kept = p
        if plan.dropout:
            seed = plan.seed
            where = over(columns, lambda k: keep(dataclasses.replace(tile, k=k), seed, plan.dropout))
            kept = p * where * (1 / (1 - plan.dropout) if plan.dropout < 1 else 0.0)
        results["kept"] = kept
    if "out" in wanted:
        results["out"] = (fold_heads(kept, v) @ v).view(*p.shape[:-1], v.shape[-1])
    if "lse" in wanted:
        lse = log_sum_exp(s)
        lse = lse if empty is None else lse.masked_fill(empty[..., 0], -math.inf)
        results["lse"] = plan.normalizer.total(lse, tile) if isinstance(plan.normalizer, Softmax) else lse
    if "max" in wanted:
        results["max"] = p.amax(-1)
    if "entropy" in wanted:
        # log of 1 in the place of 0 keeps the gradient finite there.
        results["entropy"] = -(p * torch.log(torch.where(p > 0, p, 1.0))).sum(-1)
    if "received" in wanted:
        results["received"] = p.sum(-2)
    if "mass" in wanted:
        assert summary.mass is not None
        member = summary.mass if summary.mass.dim() == 3 else summary.mass[None]
        member = (member[slice(*tile.b)] if member.shape[0] > 1 else member)[:, None]
        results["mass"] = p @ over(columns, lambda k: member[..., slice(*k)]).to(p.dtype).mT
    if "rows" in wanted:
        results["rows"] = p[..., rows_in(plan, tile)[1], :]
    if "top_weights" in wanted or "top_keys" in wanted:
        results["top_weights"], results["top_keys"] = _top(summary.top, p, s, empty, columns)
    return [results[name] for name in wanted]


def _top(k: int, p: Tensor, s: Tensor, empty: Tensor | None, columns: Sequence[Range]) -> tuple[Tensor, Tensor]:
    # Weights grow with scores, so the largest scores are the largest weights; unlike weights, they also tell a pair
    # that may not attend (-inf) from one whose weight is 0.
    best, index = s.detach().topk(min(k, s.shape[-1]), -1)
    absent = best == -math.inf
    absent = absent if empty is None else absent | empty
    keys = over(columns, lambda c: torch.arange(*c, device=s.device))[index].masked_fill(absent, -1)
    weights = p.gather(-1, index)
    missing = k - index.shape[-1]
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing))
        keys = torch.nn.functional.pad(keys, (0, missing), value=-1)
    return weights, keys


def rows_in(plan: Plan, tile: Tile) -> tuple[list[int], list[int]]:
    """The rows asked for that lie in a tile: their places in the summary, and in the tile."""
    places, rows = [], []
    for place, row in enumerate(plan.summary.row_numbers):
        row = row + tile.sizes.L if row < 0 else row
        if tile.q[0] <= row < tile.q[1]:
            places.append(place)
            rows.append(row - tile.q[0])
    return places, rows
