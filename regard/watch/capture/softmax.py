"""Weights that a model computes itself: followed from the softmax to the product with the values, and told in summaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from regard.components.summary import AttentionSummary, Summary, Top

_SOFTMAX: set[Any] = {F.softmax, torch.softmax, Tensor.softmax}
# What weights go through and stay what they are, in another precision or shape, or with some of them dropped.
_SAME: set[Any] = {
    F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16,
    Tensor.double, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.view, Tensor.reshape, torch.reshape,
    Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.unsqueeze, torch.unsqueeze, Tensor.expand,
}  # fmt: skip
_PRODUCT: set[Any] = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
}  # fmt: skip


class Followed:
    """The weights that a softmax gave, until they are forgotten."""

    def __init__(self) -> None:
        self._sources = WeakIdKeyDictionary()

    def follow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        """A function was called and gave `out`: the weights (..., L, S) that it multiplied values by, if it did.

        Weights are what a softmax over the last axis gave, and are told as that softmax gave them.
        """
        if function in _SOFTMAX:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(out, Tensor) and out.dim() > 1 and axis in (-1, out.dim() - 1):
                self._sources[out] = out.detach()
        elif function in _SAME:
            source = self._of(args) if self._sources and isinstance(out, Tensor) and out.dim() else None
            if source is not None and (source.is_nested or out.is_nested):  # which tells of no shape
                self._sources[out] = source
            elif source is not None and out.shape[-1] == source.shape[-1]:
                self._sources[out] = source if out.shape[:-2] == source.shape[:-2] else _shaped(source, out)
        elif function in _PRODUCT:
            return self._of(args) if self._sources else None
        elif function is torch.einsum and self._sources:
            return self._in_einsum(*args)
        return None

    def _of(self, args: tuple[Any, ...]) -> Tensor | None:
        tensor = args[0] if args else None
        return self._sources[tensor] if isinstance(tensor, Tensor) and tensor in self._sources else None

    def _in_einsum(self, equation: Any, *operands: Any) -> Tensor | None:
        """The operand that are weights, whose last axis is summed over."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or "->" not in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        for labels, operand in zip(inputs.split(","), operands, strict=False):
            source = self._of((operand,))
            if source is not None and labels and labels[-1] not in output:
                return source
        return None


def _shaped(source: Tensor, like: Tensor) -> Tensor:
    """The weights as something that they became, which has as many of them or repeats them."""
    if source.numel() == like.numel():
        return source.reshape(like.shape)
    return source


def by_heads(weights: Tensor, heads: int | None) -> Tensor:
    """Weights (..., L, S) as (B, H, L, S): a first axis of three may hold batch and heads, as the module says."""
    if weights.dim() == 2:
        return weights[:, None, None]
    if weights.dim() == 3:
        heads = heads if heads and weights.shape[0] % heads == 0 else 1
        return weights.view(-1, heads, *weights.shape[1:]) if weights.shape[0] else weights[:, None]
    return weights.flatten(0, -4)


def summarise(p: Tensor, summary: Summary) -> AttentionSummary:
    """The summaries of weights (B, H, L, S)."""
    p = p if p.dtype == torch.float64 else p.float()
    weights, keys = F.pad(p, (0, max(summary.top - p.shape[-1], 0))).topk(summary.top, -1)
    return AttentionSummary(
        max=p.amax(-1),
        entropy=torch.special.entr(p).sum(-1) if summary.entropy else None,
        top=Top(weights, keys.masked_fill(weights == 0, -1)),
        received=p.sum(-2) if summary.received else None,
        rows=p[..., list(summary.row_numbers), :] if summary.row_numbers else None,
    )


def are_causal(p: Tensor) -> bool:
    """Do weights (B, H, L, S) leave out every later key? The last query stands beside the last key."""
    L, S = p.shape[-2:]
    if min(L, S) < 2 or L > S or bool(p[..., 0, S - L + 1 :].any()):  # the first row tells mostly
        return False
    return not bool(p.triu(1 + S - L).any())


def looks_causal(attn_mask: Tensor | None) -> bool:
    """Does a mask (..., L, S) forbid every later key, and allow more than one key somewhere? The last query stands beside
    the last key. Large negative numbers forbid, as Hugging Face has it.
    """
    if (
        attn_mask is None
        or attn_mask.dim() < 2
        or 1 in attn_mask.shape[-2:]
        or attn_mask.shape[-2] > attn_mask.shape[-1]
    ):
        return False
    # What is repeated over batch and heads is looked at once.
    attn_mask = attn_mask[tuple(0 if step == 0 else slice(None) for step in attn_mask.stride()[:-2])]
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
    return not bool(allowed.triu(1 + allowed.shape[-1] - allowed.shape[-2]).any())
