"""Interception of attention functions: `regard` computes their outputs together with the summaries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard import nested
from regard.attention import attention
from regard.components import mask as masks
from regard.components.mask import Mask
from regard.components.predicate import conjuncts
from regard.components.score import ScaledDot
from regard.watch.capture import fast_path, flex, torch_layers
from regard.watch.capture.recorder import Recorder, has_saved_tensor_hooks, untracked
from regard.watch.capture.softmax import (
    SOFTMAX,
    SoftmaxTracker,
    has_causal_weights,
    is_causal_mask,
    split_batch,
    split_heads,
    summarize,
)

_mha_signature = inspect.signature(F.multi_head_attention_forward)
_NAMES: dict[Any, str] = {
    getattr(owner, attribute): name for name, (owner, attribute) in torch_layers.FUNCTIONS.items()
}
_NAMES[attention] = "attention"
# Functions of these types are never patched: a model calls hundreds in a short step.
_OPERATORS = frozenset({BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType})


class AttentionMode(TorchFunctionMode):
    """While active in this thread, attention calls are recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.softmax = SoftmaxTracker(recorder.attention_module)
        self._handlers = {name: getattr(self, f"_{name}") for name in _NAMES.values() if name != "softmax"}
        self._mha_heads: list[int] = []  # number of heads of the running calls of torch's multi-head attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if type(func) not in _OPERATORS:
            func = torch_layers.unpatched(func)
            if flex.is_flex(func):
                return self._flex(func, *args, **kwargs)
        name = _NAMES.get(func)
        if name is not None and name != "softmax":
            return self.handle(name, func, args, kwargs)
        out = func(*args, **kwargs)
        if not self.softmax.has_weights and func not in SOFTMAX:
            return out
        weights = self.softmax.track(func, args, kwargs, out)
        if weights is not None and weights.is_nested:
            padded = nested.to_padded(weights)
            weights = None if padded is None else padded[0]
        if weights is not None:
            self._record_weights(split_heads(weights, self._recorder.num_heads()))
        return out

    def handle(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of `function`, and record its attention."""
        return self._handlers[name](function, *args, **kwargs)

    def on_softmax(self, weights: Tensor) -> None:
        """Record the weights that torch's multi-head attention computes when it is asked to return them."""
        if self._mha_heads:
            self._record_weights(split_heads(weights.detach(), self._mha_heads[-1]))

    def _record_weights(self, p: Tensor) -> None:
        if self._recorder.should_record():
            B, H, L, S = p.shape
            self._recorder.record(summarize(p, self._recorder.summary), (B, H, L, S), has_causal_weights(p))

    def _sdpa(
        self,
        function: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        should_record = self._recorder.should_record()
        if not should_record or query.is_nested or key.is_nested:
            out = function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if should_record and query.is_nested and key.is_nested and attn_mask is None:
                self._record_nested(query, key, is_causal, scale)
            return out
        q, k, v = _broadcast(query, key, value, enable_gqa)
        mask, bias = _mask_and_bias(attn_mask, is_causal, query.dim(), q.shape[:-3])
        lead = q.shape[:-2] if query.dim() > 3 else q.shape[: query.dim() - 2]  # without the dimensions added above
        if q.dim() > 4:
            q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
        packed = self._recorder.packed_heads(q.shape[1], q.shape[2]) if q.shape[1] == k.shape[1] else None
        if packed is not None:
            q = q.reshape(q.shape[0], packed, 1, q.shape[3])
            mask, bias = _unpack_mask(attn_mask, q)
        score, wanted = _score(scale, q.shape[-1]), self._recorder.summary
        if dropout_p or has_saved_tensor_hooks():
            # Torch applies dropout with the model's random state; the summaries describe the weights before dropout.
            out = function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            with untracked():
                _, summary = attention(q, k, v, score=score, mask=mask, bias=bias, summary=wanted)
        else:
            out, summary = attention(q, k, v, score=score, mask=mask, bias=bias, summary=wanted)
            if packed or query.dim() != 4:
                rows = (out.shape[1] // k.shape[1],) if packed else out.shape[-2:-1]
                out = out.reshape(*lead, *rows, out.shape[-1])
        if query.dim() == 3:
            summary = split_batch(summary, self._recorder.num_heads())
        assert summary.max is not None
        L, S = q.shape[2], k.shape[2]
        is_decoder = (is_causal and L == S) or (packed is None and is_causal_mask(attn_mask))
        self._recorder.record(summary, (*summary.max.shape, S), is_decoder)
        return out

    def _record_nested(self, query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> None:
        """Compute the summaries of a call with nested tensors, separately from torch's attention."""
        with untracked():
            padded_query, padded_key = nested.to_padded(query), nested.to_padded(key)
            if padded_query is None or padded_key is None:
                return
            (q, queries), (k, keys) = padded_query, padded_key
            q, k, _ = _broadcast(q, k, k, True)
            mask = nested.length_mask(queries, keys, q.shape[2], k.shape[2])
            _, summary = attention(
                q,
                k,
                k,
                score=_score(scale, q.shape[-1]),
                mask=mask & masks.causal("start") if is_causal else mask,
                summary=self._recorder.summary,
            )
        is_decoder = is_causal and bool((queries == keys).all())
        self._recorder.record(summary, (*q.shape[:3], k.shape[2]), is_decoder)

    def _attention(self, function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Handle a call of `regard.attention`.

        The summaries are computed in the same pass if the call asks for none and has no dropout, and separately
        otherwise.
        """
        if not self._recorder.should_record():
            return attention(q, k, v, **arguments)
        arguments_of_summary = {**arguments, "summary": self._recorder.summary}
        if arguments["summary"] is None and not arguments["dropout"] and not has_saved_tensor_hooks():
            result, summary = attention(q, k, v, **arguments_of_summary)
        else:
            result = attention(q, k, v, **arguments)
            with untracked():
                _, summary = attention(q, k, v, **{**arguments_of_summary, "dropout": 0.0, "seed": None})
        lead = q.dim() - 2
        summary = summary.each(lambda x: x.flatten(0, lead - 2) if lead > 1 else x[:, None] if lead else x[None, None])
        if q.dim() == 3:
            summary = split_batch(summary, self._recorder.num_heads())
        assert summary.max is not None
        B, H, L = summary.max.shape
        S = k.shape[-2]
        self._recorder.record(summary, (B, H, L, S), _excludes_later_keys(arguments["mask"], L, S))
        return result

    def _flex(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._recorder.should_record():
            return function(*args, **kwargs)
        out, summary, is_causal = flex.attend(self._recorder.summary, function, *args, **kwargs)
        assert summary.max is not None
        self._recorder.record(summary, (*summary.max.shape, args[1].shape[-2]), is_causal)
        return out

    def _mha(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Handle torch's multi-head attention, which calls SDPA or a softmax while this mode is disabled."""
        self._mha_heads.append(_mha_signature.bind(*args, **kwargs).arguments["num_heads"])
        try:
            with torch_layers.dispatch_to(self):
                return function(*args, **kwargs)
        finally:
            self._mha_heads.pop()

    def _fast_mha(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        fast_path.record_attention(self._recorder, *args, **kwargs)
        return out

    def _fast_layer(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        fast_path.record_layer(self._recorder, *args, **kwargs)
        return out


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast queries, keys and values (..., H, L, D) over the dimensions before H, as torch does."""
    fits = query.dim() == key.dim() == value.dim() == 4 and query.size(0) == key.size(0) == value.size(0)
    if fits and (enable_gqa or query.size(1) == key.size(1) == value.size(1)):
        return query, key, value
    tensors = [x[None, None] if x.dim() == 2 else x[:, None] if x.dim() == 3 else x for x in (query, key, value)]
    end = -3 if enable_gqa else -2
    lead = torch.broadcast_shapes(*(x.shape[:end] for x in tensors))  # type: ignore[no-untyped-call]
    q, k, v = (x.expand(*lead, *x.shape[end:]) for x in tensors)
    return q, k, v


def _score(scale: float | None, width: int) -> ScaledDot | None:
    """Convert torch's scale. None, the default, takes the shortest path of a call."""
    return None if scale is None or scale == width**-0.5 else ScaledDot(float(scale))


def _mask_and_bias(
    attn_mask: Tensor | None, is_causal: bool, dims: int, lead: torch.Size
) -> tuple[Mask | None, Tensor | None]:
    """Convert torch's mask arguments. dims: number of dimensions of the query; lead: its shape before the heads."""
    if attn_mask is None:
        return (masks.causal("start") if is_causal else None), None
    if dims == 3 and attn_mask.dim() == 3:
        attn_mask = attn_mask[:, None]
    elif attn_mask.dim() > 4:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    if attn_mask.dtype == torch.bool:
        return masks.dense(attn_mask), None
    return None, attn_mask


def _unpack_mask(attn_mask: Tensor | None, q: Tensor) -> tuple[Mask | None, Tensor | None]:
    """Convert the mask of a call whose heads are packed into the axis of queries, for q (B, H, 1, D)."""
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] * attn_mask.shape[2] == q.shape[1]:
        attn_mask = attn_mask.reshape(attn_mask.shape[0], q.shape[1], 1, attn_mask.shape[3])
    return _mask_and_bias(attn_mask, False, 4, q.shape[:1])


def _excludes_later_keys(mask: Mask | None, L: int, S: int) -> bool:
    """Return whether a mask excludes every later key, with the last query at the last key."""
    return any(
        isinstance(part, masks.Band) and part.right == 0 and (L == S or part.align == "end") for part in conjuncts(mask)
    )
