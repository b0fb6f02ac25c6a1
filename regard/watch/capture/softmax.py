"""Attention that a model writes out: a softmax is tracked up to the matrix product with the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from regard.components.summary import AttentionSummary, Summary, Top

_SOFTMAX: set[Any] = {F.softmax, torch.softmax, Tensor.softmax}
# Functions whose result still holds the weights: in another dtype or shape, or after dropout.
_PRESERVING: set[Any] = {
    F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16,
    Tensor.double, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.view, Tensor.reshape, torch.reshape,
    Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.unsqueeze, torch.unsqueeze, Tensor.expand,
}  # fmt: skip
_MATMULS: set[Any] = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
}  # fmt: skip


class SoftmaxTracker:
    """The results of softmax functions, and the tensors derived from them, for as long as they are alive."""

    def __init__(self) -> None:
        self._sources = WeakIdKeyDictionary()

    def track(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        """Track one function call.

        Returns:
            The weights (..., L, S) that the function multiplied by values, as the softmax over the last dimension
            returned them; None if it did not do that.
        """
        if function in _SOFTMAX:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(out, Tensor) and out.dim() > 1 and axis in (-1, out.dim() - 1):
                self._sources[out] = out.detach()
        elif function in _PRESERVING:
            source = self._source_of(args) if self._sources and isinstance(out, Tensor) and out.dim() else None
            if source is not None and (source.is_nested or out.is_nested):  # nested tensors have no shape to compare
                self._sources[out] = source
            elif source is not None and out.shape[-1] == source.shape[-1]:
                self._sources[out] = source if out.shape[:-2] == source.shape[:-2] else _reshape_like(source, out)
        elif function in _MATMULS:
            return self._source_of(args) if self._sources else None
        elif function is torch.einsum and self._sources:
            return self._source_in_einsum(*args)
        return None

    def _source_of(self, args: tuple[Any, ...]) -> Tensor | None:
        tensor = args[0] if args else None
        return self._sources[tensor] if isinstance(tensor, Tensor) and tensor in self._sources else None

    def _source_in_einsum(self, equation: Any, *operands: Any) -> Tensor | None:
        """Return the weights among the operands, if their last dimension is summed over."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or "->" not in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        for labels, operand in zip(inputs.split(","), operands, strict=False):
            source = self._source_of((operand,))
            if source is not None and labels and labels[-1] not in output:
                return source
        return None


def _reshape_like(source: Tensor, like: Tensor) -> Tensor:
    """Return the weights in the shape of a tensor derived from them, unless that one repeats them."""
    if source.numel() == like.numel():
        return source.reshape(like.shape)
    return source


def split_heads(weights: Tensor, heads: int | None) -> Tensor:
    """Reshape weights (..., L, S) to (B, H, L, S).

    heads: the number of heads, if known. Weights (B * H, L, S) are split by it; without it they have one head.
    """
    if weights.dim() == 2:
        return weights[:, None, None]
    if weights.dim() == 3:
        heads = heads if heads and weights.shape[0] % heads == 0 else 1
        return weights.view(-1, heads, *weights.shape[1:]) if weights.shape[0] else weights[:, None]
    return weights.flatten(0, -4)


def split_batch(summary: AttentionSummary, heads: int | None) -> AttentionSummary:
    """Reshape statistics (B * H, 1, ...) of a call whose heads are folded into the batch to (B, H, ...)."""
    assert summary.max is not None
    if not heads or heads == 1 or summary.max.shape[0] % heads or summary.max.shape[1] != 1:
        return summary
    return summary.each(lambda x: x.view(-1, heads, *x.shape[2:]))


def summarize(p: Tensor, summary: Summary) -> AttentionSummary:
    """Compute the statistics of weights (B, H, L, S)."""
    p = p if p.dtype == torch.float64 else p.float()
    weights, keys = F.pad(p, (0, max(summary.top - p.shape[-1], 0))).topk(summary.top, -1)
    return AttentionSummary(
        max=p.amax(-1),
        entropy=torch.special.entr(p).sum(-1) if summary.entropy else None,
        top=Top(weights, keys.masked_fill(weights == 0, -1)),
        received=p.sum(-2) if summary.received else None,
        rows=p[..., list(summary.row_numbers), :] if summary.row_numbers else None,
    )


def has_causal_weights(p: Tensor) -> bool:
    """Return whether weights (B, H, L, S) are zero for every later key, with the last query at the last key, except in rows
    of padded queries, which attend to every key.
    """
    L, S = p.shape[-2:]
    if min(L, S) < 2 or L > S:
        return False
    if bool(p[..., L - 2, S - 1].all()):  # of most models that are not causal
        return False
    return _excludes_later(p != 0)


def _excludes_later(allowed: Tensor) -> bool:
    """Return whether all rows of bools (..., L, S) exclude the later keys, where they do not allow every key."""
    L, S = allowed.shape[-2:]
    is_full = allowed.all(-1)
    has_later = allowed.triu(1 + S - L).any(-1)
    return not bool((has_later & ~is_full).any()) and bool((~is_full[..., :-1]).any())


def is_causal_mask(attn_mask: Tensor | None) -> bool:
    """Return whether a mask (..., L, S) excludes every later key, with the last query at the last key.

    A bool mask excludes where it is False, a float mask at -1e4 and below, as masks of Hugging Face do. Rows of padded
    queries may allow every key. A mask with a single query or key is not causal.
    """
    if (
        attn_mask is None
        or attn_mask.dim() < 2
        or 1 in attn_mask.shape[-2:]
        or attn_mask.shape[-2] > attn_mask.shape[-1]
    ):
        return False
    # Index dimensions of stride 0, along which the mask is expanded.
    attn_mask = attn_mask[tuple(0 if step == 0 else slice(None) for step in attn_mask.stride()[:-2])]
    return _excludes_later(attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4)
