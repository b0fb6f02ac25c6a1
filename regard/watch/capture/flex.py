"""FlexAttention: its score and mask functions, in tiles, with summaries.

Run outside of a compiler it takes all scores at once; this takes them in tiles, with memory linear in length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.attention import attention
from regard.components import mask as masks
from regard.components.mask import Mask
from regard.components.score import Product, Score
from regard.components.summary import AttentionSummary, Summary
from regard.components.tile import Sizes, Tile
from regard.watch.capture.recorder import aside, is_kept_by_others

Vectorised = Callable[..., Tensor]


def is_flex(function: Any) -> bool:
    """Is it the operator that `flex_attention` comes down to?"""
    return isinstance(function, torch._ops.HigherOrderOperator) and function._name == "flex_attention"


@dataclass(frozen=True)
class Modified(Score):
    """scale q.k, changed by a function (score, b, h, q_idx, kv_idx) -> score of single numbers."""

    scale: float
    change: Vectorised

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        return self.change(Product(self.scale).scores(q, k, tile), *_places(tile))

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """The operator has checked its arguments."""


def _places(tile: Tile) -> tuple[Tensor, ...]:
    return tile.batch.flatten(), tile.head.flatten(), tile.query.flatten(), tile.key.flatten()


def _vectorised(function: Callable[..., Tensor], buffers: tuple[Any, ...], scored: bool) -> Vectorised:
    """A function of single numbers as one of vectors: of batch rows, heads, queries and keys, and before them, if it is
    `scored`, of scores (b, h, l, s).
    """
    first = (0,) if scored else ()
    rest = (None,) * len(buffers)
    for axis in (3, 2, 1, 0):
        places = tuple(0 if other == axis else None for other in range(4))
        function = torch.vmap(function, in_dims=(*first, *places, *rest))

    def vectorised(*arguments: Tensor) -> Tensor:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():  # a table may be read at a place
            return function(*arguments, *buffers)

    return vectorised


def answer(
    summary: Summary,
    function: Callable[..., tuple[Tensor, ...]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> tuple[tuple[Tensor, ...], AttentionSummary, bool]:
    """What the operator gives, the summaries, and whether no query may attend to a later key."""
    change = _vectorised(score_mod, score_mod_other_buffers, True)
    may = _vectorised(block_mask[-1], mask_mod_other_buffers, False)
    mask = masks.where(lambda b, h, q, k: may(b.flatten(), h.flatten(), q.flatten(), k.flatten()))
    table = _table(block_mask)
    mask = mask if table is None else mask & table
    words: dict[str, Any] = {"score": Modified(scale, change), "mask": mask}
    causal = _is_causal(may, query.shape[-2], key.shape[-2], query.device)
    if kernel_options.get("OUTPUT_MAX") or is_kept_by_others() or _has_gradients(change, query.device):
        # What only the operator itself can give: the largest scores, and gradients of what the functions close over.
        out = function(
            query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_other_buffers,
            mask_mod_other_buffers,
        )  # fmt: skip
        with aside():
            _, seen = attention(query, key, value, **words, summary=summary)
        return out, seen, causal
    asked = Summary(True, summary.max, summary.entropy, summary.top, summary.received, None, summary.rows)
    result, seen = attention(query, key, value, **words, summary=asked)
    assert seen.lse is not None
    return (result, seen.lse / math.log(2), result.new_zeros(())), seen, causal


def _table(block_mask: tuple[Any, ...]) -> Mask | None:
    """Which blocks may attend to which, as the operator was told; None where there is one block alone."""
    counts, indices, full_counts, full_indices = block_mask[2:6]
    rows, columns = counts.shape[-1], indices.shape[-1]
    if rows * columns <= 1:
        return None
    table = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    for count, index in ((counts, indices), (full_counts, full_indices)):
        if count is not None:
            listed = torch.arange(columns, device=index.device) < count[..., None]
            table.scatter_(-1, index.long().where(listed, columns), True)  # what is not listed falls into the last
    return masks.blocks(table[..., :columns], (int(block_mask[-3]), int(block_mask[-2])))


def _has_gradients(change: Vectorised, device: torch.device) -> bool:
    """Does the function of scores close over what wants a gradient?"""
    if not torch.is_grad_enabled():
        return False
    place = torch.zeros(1, dtype=torch.int64, device=device)
    return change(torch.zeros(1, 1, 1, 1, device=device), place, place, place, place).requires_grad


def _is_causal(may: Vectorised, L: int, S: int, device: torch.device) -> bool:
    """May no query attend to the next key, nor to the last one, nor the first query to any but its own?"""
    if L != S or L < 2:
        return False
    zero, places = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(L, device=device)
    if bool(may(zero, zero, zero, places[1:]).any()) or bool(may(zero, zero, places[:-1], places[-1:]).any()):
        return False
    return not any(bool(may(zero, zero, q, q + 1).any()) for q in places[:-1, None][:: max(L // 16, 1)])
