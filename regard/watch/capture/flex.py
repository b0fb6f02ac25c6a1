"""FlexAttention: its score and mask functions, evaluated in tiles, with summaries.

Uncompiled, the operator materializes all scores. Here memory is linear in length.
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
from regard.watch.capture.recorder import has_saved_tensor_hooks, untracked

Vectorized = Callable[..., Tensor]


def is_flex(function: Any) -> bool:
    """Return whether a function is the operator that `flex_attention` calls."""
    return isinstance(function, torch._ops.HigherOrderOperator) and function._name == "flex_attention"


@dataclass(frozen=True)
class FlexScore(Score):
    """score_mod(scale q.k, b, h, q_idx, kv_idx)."""

    scale: float
    score_mod: Vectorized

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        return self.score_mod(Product(self.scale).scores(q, k, tile), *_tile_indices(tile))

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """The operator has checked its arguments."""


def _tile_indices(tile: Tile) -> tuple[Tensor, ...]:
    return tile.batch.flatten(), tile.head.flatten(), tile.query.flatten(), tile.key.flatten()


def _vectorize(function: Callable[..., Tensor], buffers: tuple[Any, ...], takes_score: bool) -> Vectorized:
    """Vectorize a function of scalar indices over vectors of batch, head, query and key indices.

    takes_score: its first argument is a score; the vectorized function takes scores (b, h, l, s).
    """
    score_dims = (0,) if takes_score else ()
    buffer_dims = (None,) * len(buffers)
    for axis in (3, 2, 1, 0):
        index_dims = tuple(0 if other == axis else None for other in range(4))
        function = torch.vmap(function, in_dims=(*score_dims, *index_dims, *buffer_dims))

    def vectorized(*arguments: Tensor) -> Tensor:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():  # allows indexing a tensor by an index under vmap
            return function(*arguments, *buffers)

    return vectorized


def attend(
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
    """Return the outputs of the operator `function`, the summaries, and whether no query may attend to a later key."""
    score_function = _vectorize(score_mod, score_mod_other_buffers, True)
    mask_function = _vectorize(block_mask[-1], mask_mod_other_buffers, False)
    mask = masks.where(lambda b, h, q, k: mask_function(b.flatten(), h.flatten(), q.flatten(), k.flatten()))
    table = _block_table(block_mask)
    mask = mask if table is None else mask & table
    components: dict[str, Any] = {"score": FlexScore(scale, score_function), "mask": mask}
    is_causal = _is_causal(mask_function, query.shape[-2], key.shape[-2], query.device)
    if kernel_options.get("OUTPUT_MAX") or has_saved_tensor_hooks() or _has_gradients(score_function, query.device):
        # Only the operator returns the maximum scores, and gradients of tensors that the functions close over.
        out = function(
            query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_other_buffers,
            mask_mod_other_buffers,
        )  # fmt: skip
        with untracked():
            _, summaries = attention(query, key, value, **components, summary=summary)
        return out, summaries, is_causal
    with_lse = Summary(
        lse=True,
        max=summary.max,
        entropy=summary.entropy,
        top=summary.top,
        received=summary.received,
        rows=summary.rows,
    )
    result, summaries = attention(query, key, value, **components, summary=with_lse)
    assert summaries.lse is not None
    return (result, summaries.lse / math.log(2), result.new_zeros(())), summaries, is_causal


def _block_table(block_mask: tuple[Any, ...]) -> Mask | None:
    """Return the block sparsity of a BlockMask as a mask; None where there is a single block."""
    counts, indices, full_counts, full_indices = block_mask[2:6]
    rows, columns = counts.shape[-1], indices.shape[-1]
    if rows * columns <= 1:
        return None
    table = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    for count, index in ((counts, indices), (full_counts, full_indices)):
        if count is not None:
            is_listed = torch.arange(columns, device=index.device) < count[..., None]
            table.scatter_(-1, index.long().where(is_listed, columns), True)  # unlisted entries go to the extra column
    return masks.blocks(table[..., :columns], (int(block_mask[-3]), int(block_mask[-2])))


def _has_gradients(score_function: Vectorized, device: torch.device) -> bool:
    """Return whether a score function closes over a tensor that requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    index = torch.zeros(1, dtype=torch.int64, device=device)
    return score_function(torch.zeros(1, 1, 1, 1, device=device), index, index, index, index).requires_grad


def _is_causal(mask_function: Vectorized, L: int, S: int, device: torch.device) -> bool:
    """Return whether a mask function is causal, judged by O(L) pairs.

    These are the pairs of the first query, the pairs of the last key, and about 16 pairs (q, q + 1).
    """
    if L != S or L < 2:
        return False
    zero, indices = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(L, device=device)
    if bool(mask_function(zero, zero, zero, indices[1:]).any()):
        return False
    if bool(mask_function(zero, zero, indices[:-1], indices[-1:]).any()):
        return False
    return not any(bool(mask_function(zero, zero, q, q + 1).any()) for q in indices[:-1, None][:: max(L // 16, 1)])
