"""Attention that a model writes out: a softmax is tracked up to the matrix product with the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from regard.components.summary import AttentionSummary, Summary, Top

# The functions whose results are weights.
SOFTMAX: set[Any] = {F.softmax, torch.softmax, Tensor.softmax}
# Functions after which the weights are still those of the argument: with another dtype, or before dropout.
_SAME_WEIGHTS: set[Any] = {
    F.dropout, torch.dropout, torch.dropout_, Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.half,
    Tensor.bfloat16, Tensor.double,
}  # fmt: skip
_PERMUTATIONS: set[Any] = {
    torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.swapdims,
    Tensor.swapdims, torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis, Tensor.adjoint, torch.adjoint,
    Tensor.t, torch.t, Tensor.mT.__get__, Tensor.T.__get__, Tensor.mH.__get__, Tensor.H.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
# Functions of the shape of their argument whose results are no weights.
_OTHER: set[Any] = {
    torch.log, Tensor.log, torch.log2, Tensor.log2, torch.log1p, Tensor.log1p, torch.cumsum, Tensor.cumsum,
    torch.cumprod, Tensor.cumprod, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
    torch.rand_like, torch.randn_like, F.layer_norm, F.log_softmax, torch.log_softmax, Tensor.log_softmax,
    torch.special.entr, torch.fft.fft,
}  # fmt: skip
# The names of the two operands of each matrix product, and the position of the first.
_MATMULS: dict[Any, tuple[int, str, str]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (0, "input", "other")),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), (0, "input", "mat2")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), (1, "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm), (1, "batch1", "batch2")),
}


class _Tracked(NamedTuple):
    """What is known of a tensor that holds weights."""

    weights: Tensor  # (..., L, S), before dropout
    key_axis: int  # the dimension of the keys in the tensor, from the end: -1 or -2
    is_dropped: bool  # whether dropout has been applied to the tensor
    number: int  # of the softmax


class SoftmaxTracker:
    """The results of softmax functions, and the tensors derived from them, for as long as they are alive.

    Args:
        attention_module: returns the name of the running module if it is one of attention, otherwise None.
    """

    def __init__(self, attention_module: Callable[[], str | None] = lambda: None) -> None:
        self._attention_module = attention_module
        self._tracked = WeakIdKeyDictionary()
        self._count = 0
        self._pending: dict[int, str] = {}  # the modules of softmax functions whose weights reached no values yet

    @property
    def has_weights(self) -> bool:
        """Whether a tensor that holds weights is alive."""
        return bool(self._tracked.data)

    @property
    def unseen(self) -> list[str]:
        """The names of attention modules with weights that were not followed to a product with values."""
        return list(dict.fromkeys(self._pending.values()))

    def track(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        """Track one function call.

        Returns:
            The weights (..., L, S) that the function multiplied by values, before dropout; None if it did not do that.
        """
        if function in SOFTMAX:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(out, Tensor) and out.dim() > 1 and axis in (-1, out.dim() - 1):
                self._start(out)
            return None
        if not self.has_weights:
            return None
        if function in _MATMULS or function is Tensor.__rmatmul__ or function is torch.einsum:
            return self._weights_in_product(function, args, kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and function not in _OTHER:
            for x in (*args, *kwargs.values()):
                found = self._of(x)
                if found is not None:
                    self._derive(found, x, function, args, kwargs, out)
                    break
        return None

    def _start(self, out: Tensor) -> None:
        self._count += 1
        self._tracked[out] = _Tracked(out.detach(), -1, False, self._count)
        name = self._attention_module() if out.dim() > 2 else None
        if name is not None:
            self._pending[self._count] = name

    def _of(self, x: Any) -> _Tracked | None:
        return self._tracked[x] if isinstance(x, Tensor) and x in self._tracked else None

    def _reach_values(self, found: _Tracked) -> Tensor:
        self._pending.pop(found.number, None)
        return found.weights

    def _weights_in_product(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return the weights whose keys a product sums over: the last dimension on the left, the one before on the right."""
        if function is torch.einsum:
            return self._weights_in_einsum(*args)
        if function is Tensor.__rmatmul__:
            left, right = args[1], args[0]
        else:
            first, *names = _MATMULS[function]
            operands = list(args[first:])
            left, right = [operands.pop(0) if operands else kwargs.get(name, kwargs.get("self")) for name in names]
        for operand, axis in ((left, -1), (right, -2)):
            found = self._of(operand)
            if found is not None and found.key_axis == axis:
                weights = self._reach_values(found)
                # A matrix times a matrix: its rows are queries. In an einsum they are batch rows with one query each.
                return weights[None] if weights.dim() == 2 else weights
        return None

    def _weights_in_einsum(self, equation: Any, *operands: Any) -> Tensor | None:
        """Return the weights among the operands, if their keys are summed over."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or "->" not in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        for labels, operand in zip(inputs.split(","), operands, strict=False):
            found = self._of(operand)
            if found is not None and len(labels) >= -found.key_axis and labels[found.key_axis] not in output:
                return self._reach_values(found)
        return None

    def _derive(
        self,
        found: _Tracked,
        x: Tensor,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
    ) -> None:
        """Track `out`, which a function computed from `x`, if it still holds the weights."""
        if x.is_nested or out.is_nested:  # they have no shape to compare
            if function in _SAME_WEIGHTS or out.is_nested:
                self._tracked[out] = found
            return
        axis: int | None = found.key_axis
        if function in _PERMUTATIONS:
            axis = _permuted_axis(function, x, args, kwargs, found.key_axis)
        elif not _keeps_keys(x, out, found.key_axis):
            axis = None
        if axis not in (-1, -2):
            return
        is_dropped = found.is_dropped or function in (F.dropout, torch.dropout, torch.dropout_)
        weights = found.weights
        if function not in _SAME_WEIGHTS:
            result = out.detach()
            if found.is_dropped and found.key_axis == -1 and weights.shape == x.shape:
                # The same function of the weights before dropout.
                with torch.no_grad():
                    some = [weights if a is x else a for a in args]
                    result = function(*some, **{key: weights if a is x else a for key, a in kwargs.items()})
            weights = result if axis == -1 else result.mT
        self._tracked[out] = _Tracked(weights, axis, is_dropped, found.number)


def _keeps_keys(x: Tensor, out: Tensor, key_axis: int) -> bool:
    """Return whether a function that permutes no dimensions kept the dimension of the keys, or a part of it."""
    if out.shape == x.shape:
        return True
    is_view = out._base is not None and (out._base is x or out._base is x._base)
    if not is_view and out.numel() != x.numel() and out.dim() != x.dim():
        return False
    if out.dim() == x.dim():  # a slice, or an expanded tensor
        return is_view or out.shape[key_axis:] == x.shape[key_axis:]
    return key_axis == -1 and out.dim() > 0 and out.shape[-1] == x.shape[-1]


def _permuted_axis(
    function: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], key_axis: int
) -> int:
    """Return where a permutation of dimensions moves the keys, from the end."""
    probe = torch.empty(tuple(range(2, 2 + x.dim())), device="meta")
    result = function(*[probe if a is x else a for a in args], **{k: probe if a is x else a for k, a in kwargs.items()})
    return list(result.shape).index(probe.shape[key_axis]) - x.dim()


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
