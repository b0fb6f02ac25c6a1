"""How attention is seen where it is called: calls of torch's attention functions are answered by `regard`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard.attention import attention
from regard.components import mask as masks
from regard.components.mask import Mask
from regard.components.score import ScaledDot
from regard.components.summary import Summary
from regard.watch.capture import fast_path, flex, nested, torch_layers
from regard.watch.capture.recorder import Ask, aside, is_kept_by_others
from regard.watch.capture.softmax import Followed, are_causal, by_heads, looks_causal, summarise

_mha_arguments = inspect.signature(F.multi_head_attention_forward)
_NAMES: dict[Any, str] = {
    getattr(owner, attribute): name for name, (owner, attribute) in torch_layers.FUNCTIONS.items()
}
_NAMES[attention] = "attention"


class Intercept(TorchFunctionMode):
    """While active, in this thread: attention is computed by `regard`, and its summaries are told."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self._ask = ask
        self._followed = Followed()
        self._heads: list[int] = []  # of the calls of torch's multi-head attention that are under way

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        func = torch_layers.original(func)
        name = _NAMES.get(func)
        if name is not None and name != "softmax":
            return self.answer(name, func, args, kwargs)
        if flex.is_flex(func):
            return self._flex(func, *args, **kwargs)
        out = func(*args, **kwargs)
        weights = self._followed.follow(func, args, kwargs, out)
        if weights is not None and weights.is_nested:
            found = nested.padded(weights)
            weights = None if found is None else found[0]
        if weights is not None:
            self._tell_weights(by_heads(weights, self._ask.heads()))
        return out

    def answer(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what `function` does, and tell of it."""
        return getattr(self, f"_{name}")(function, *args, **kwargs)

    def see_softmax(self, weights: Tensor) -> None:
        """Torch's multi-head attention took a softmax, as it does when it is asked for weights."""
        if self._heads:
            self._tell_weights(by_heads(weights.detach(), self._heads[-1]))

    def _tell_weights(self, p: Tensor) -> None:
        summary = self._ask.wanted()
        if summary is not None:
            B, H, L, S = p.shape
            self._ask.tell(summarise(p, summary), (B, H, L, S), are_causal(p))

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
        summary = self._ask.wanted()
        nests = query.is_nested or key.is_nested
        if summary is None or nests:
            out = function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if summary is not None and query.is_nested and key.is_nested and attn_mask is None:
                self._tell_nested(summary, query, key, is_causal, scale)
            return out
        q, k, v = _batched(query, key, value, enable_gqa)
        mask, bias = _restrictions(attn_mask, is_causal, query.dim(), q.shape[:-3])
        lead = q.shape[:-2] if query.dim() > 3 else q.shape[: query.dim() - 2]  # without the axes that were put in
        q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
        score = None if scale is None else ScaledDot(float(scale))
        if dropout_p or is_kept_by_others():
            # The model's own random numbers decide what it drops; the summaries are of the weights before that.
            out = function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            with aside():
                _, seen = attention(q, k, v, score=score, mask=mask, bias=bias, summary=summary)
        else:
            answer, seen = attention(q, k, v, score=score, mask=mask, bias=bias, summary=summary)
            out = answer.reshape(*lead, *answer.shape[-2:])
        B, H, L, _ = q.shape
        S = k.shape[2]
        self._ask.tell(seen, (B, H, L, S), (is_causal and L == S) or looks_causal(attn_mask))
        return out

    def _tell_nested(self, summary: Summary, query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> None:
        """Texts of several lengths without padding: torch attends, and the weights are computed beside it."""
        with aside():
            asks, answers = nested.padded(query), nested.padded(key)
            if asks is None or answers is None:
                return
            (q, queries), (k, keys) = asks, answers
            q, k, _ = _batched(q, k, k, True)
            may = nested.within(queries, keys, q.shape[2], k.shape[2])
            score = None if scale is None else ScaledDot(float(scale))
            _, seen = attention(
                q, k, k, score=score, mask=may & masks.causal("start") if is_causal else may, summary=summary
            )
        self._ask.tell(seen, (*q.shape[:3], k.shape[2]), is_causal and bool((queries == keys).all()))

    def _attention(self, function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **words: Any) -> Any:
        """A call of our own: what it asks for stays the same, and the watch's summaries come in the same pass if it asks for
        none of its own, and drops nothing.
        """
        summary = self._ask.wanted()
        if summary is None:
            return attention(q, k, v, **words)
        if words["summary"] is None and not words["dropout"] and not is_kept_by_others():
            answer, seen = attention(q, k, v, **{**words, "summary": summary})
        else:
            answer = attention(q, k, v, **words)
            with aside():
                _, seen = attention(q, k, v, **{**words, "summary": summary, "dropout": 0.0, "seed": None})
        lead = q.dim() - 2
        seen = seen.each(lambda x: x.flatten(0, lead - 2) if lead > 1 else x[:, None] if lead else x[None, None])
        assert seen.max is not None
        B, H, L = seen.max.shape
        self._ask.tell(seen, (B, H, L, k.shape[-2]), _forbids_later(words["mask"], L, k.shape[-2]))
        return answer

    def _flex(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        summary = self._ask.wanted()
        if summary is None:
            return function(*args, **kwargs)
        out, seen, causal = flex.answer(summary, function, *args, **kwargs)
        assert seen.max is not None
        self._ask.tell(seen, (*seen.max.shape, args[1].shape[-2]), causal)
        return out

    def _mha(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """It calls torch's attention out of reach of a mode or, asked for weights, takes a softmax of its own."""
        self._heads.append(_mha_arguments.bind(*args, **kwargs).arguments["num_heads"])
        try:
            with torch_layers.answered_by(self):
                return function(*args, **kwargs)
        finally:
            self._heads.pop()

    def _fast_mha(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        fast_path.tell_attention(self._ask, *args, **kwargs)
        return out

    def _fast_layer(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        fast_path.tell_layer(self._ask, *args, **kwargs)
        return out


def _batched(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., H, L, D), with all axes before H alike, as torch broadcasts them."""
    tensors = [x[None, None] if x.dim() == 2 else x[:, None] if x.dim() == 3 else x for x in (query, key, value)]
    end = -3 if grouped else -2
    lead = torch.broadcast_shapes(*(x.shape[:end] for x in tensors))  # type: ignore[no-untyped-call]
    q, k, v = (x.expand(*lead, *x.shape[end:]) for x in tensors)
    return q, k, v


def _restrictions(
    attn_mask: Tensor | None, is_causal: bool, axes: int, lead: torch.Size
) -> tuple[Mask | None, Tensor | None]:
    """Torch's mask arguments as a mask and a bias. axes: of the query; lead: its axes before the heads."""
    if attn_mask is None:
        return (masks.causal("start") if is_causal else None), None
    if axes == 3 and attn_mask.dim() == 3:
        attn_mask = attn_mask[:, None]
    elif attn_mask.dim() > 4:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    if attn_mask.dtype == torch.bool:
        return masks.dense(attn_mask), None
    return None, attn_mask


def _forbids_later(mask: Mask | None, L: int, S: int) -> bool:
    """Does a mask of ours forbid every later key, the last query standing beside the last key?"""
    if isinstance(mask, masks.And):
        return _forbids_later(mask.left, L, S) or _forbids_later(mask.right, L, S)
    return isinstance(mask, masks.Band) and mask.right == 0 and (L == S or mask.align == "end")
