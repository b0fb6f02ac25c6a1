"""How attention is seen where it is called: calls of torch's attention functions are answered by `regard`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard import mask as masks
from regard.attention import attention
from regard.mask import Mask
from regard.score import ScaledDot
from regard.summary import Seen, Summary, Top

# What is told of a call: the summaries, the shape (B, H, L, S), and whether it is causal.
Tell = Callable[[Seen, tuple[int, int, int, int], bool], None]

_sdpa = F.scaled_dot_product_attention
_mha = F.multi_head_attention_forward
_mha_arguments = inspect.signature(_mha)
_patching = threading.Lock()


class Intercept(TorchFunctionMode):
    """While active, in this thread: attention is computed by `regard`, and its summaries are told.

    `wanted` says which summaries a call is to give, or None to leave it alone.
    """

    def __init__(self, wanted: Callable[[], Summary | None], tell: Tell) -> None:
        super().__init__()
        self.wanted, self.tell = wanted, tell

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _sdpa:
            return self._sdpa(*args, **kwargs)
        if func is attention:
            return self._attention(*args, **kwargs)
        if func is _mha:
            return self._mha(_mha_arguments.bind(*args, **kwargs))
        return func(*args, **kwargs)

    def _sdpa(
        self,
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
        summary = self.wanted()
        if summary is None:
            return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        q, k, v = (x[None, None] if x.dim() == 2 else x[:, None] if x.dim() == 3 else x for x in (query, key, value))
        q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
        mask, bias = _restrictions(attn_mask, is_causal, query.dim())
        score = None if scale is None else ScaledDot(float(scale))
        if dropout_p:
            # The model's own random numbers decide what it drops; the summaries are of the weights before that.
            out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            with torch.no_grad():
                _, seen = attention(q, k, v, score=score, mask=mask, bias=bias, summary=summary)
        else:
            answer, seen = attention(q, k, v, score=score, mask=mask, bias=bias, summary=summary)
            out = answer.reshape(*query.shape[:-1], value.shape[-1])
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        self.tell(_each(seen, Tensor.detach), shape, is_causal or _looks_causal(attn_mask))
        return out

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **words: Any) -> Any:
        """A call of our own: what it asks for stays the same, and the watch's summaries come in the same pass if it asks for
        none of its own, and drops nothing.
        """
        summary = self.wanted()
        if summary is None:
            return attention(q, k, v, **words)
        if words["summary"] is None and not words["dropout"]:
            answer, seen = attention(q, k, v, **{**words, "summary": summary})
        else:
            answer = attention(q, k, v, **words)
            with torch.no_grad():
                _, seen = attention(q, k, v, **{**words, "summary": summary, "dropout": 0.0, "seed": None})
        lead = q.dim() - 2
        seen = _each(seen, lambda x: x.flatten(0, lead - 2) if lead > 1 else x[:, None] if lead else x[None, None])
        assert seen.max is not None
        B, H, L = seen.max.shape
        self.tell(_each(seen, Tensor.detach), (B, H, L, k.shape[-2]), _forbids_later(words["mask"]))
        return answer

    def _mha(self, call: inspect.BoundArguments) -> tuple[Tensor, Tensor | None]:
        """`nn.MultiheadAttention` calls torch's attention out of reach of a mode, or, asked for weights, a path of its
        own: the first is patched while it runs, the second hands its weights over.
        """
        call.apply_defaults()
        arguments = call.arguments
        if not arguments["need_weights"]:
            with _patched(self._sdpa):
                return _mha(**arguments)
        averaged = arguments["average_attn_weights"]
        out, weights = _mha(**{**arguments, "average_attn_weights": False})
        assert weights is not None
        summary = self.wanted()
        if summary is not None:
            p = weights if weights.dim() == 4 else weights[None]
            B, H, L, S = p.shape
            self.tell(_from_weights(p.detach(), summary), (B, H, L, S), _looks_causal(arguments["attn_mask"]))
        return out, weights.mean(-3) if averaged else weights


@contextmanager
def _patched(replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Answer calls of torch's attention from this thread, and leave those of other threads alone."""
    owner = threading.get_ident()

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        mine = threading.get_ident() == owner
        return replacement(*args, **kwargs) if mine else _sdpa(*args, **kwargs)

    with _patching:
        F.scaled_dot_product_attention = answer
        try:
            yield
        finally:
            F.scaled_dot_product_attention = _sdpa


def _restrictions(attn_mask: Tensor | None, is_causal: bool, axes: int) -> tuple[Mask | None, Tensor | None]:
    """Torch's mask arguments as a mask and a bias."""
    if attn_mask is None:
        return (masks.causal("start") if is_causal else None), None
    if axes == 3 and attn_mask.dim() == 3:
        attn_mask = attn_mask[:, None]
    elif attn_mask.dim() > 4:
        attn_mask = attn_mask.flatten(0, -4)
    if attn_mask.dtype == torch.bool:
        return masks.dense(attn_mask), None
    return None, attn_mask


def _looks_causal(attn_mask: Tensor | None) -> bool:
    """Does a mask forbid every later key, and allow more than one key somewhere? The last query stands beside the last
    key. Large negative numbers forbid, as Hugging Face has it.
    """
    if attn_mask is None or attn_mask.dim() < 2 or 1 in attn_mask.shape[-2:]:
        return False
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
    return not bool(allowed.triu(1 + allowed.shape[-1] - allowed.shape[-2]).any())


def _from_weights(p: Tensor, summary: Summary) -> Seen:
    """The summaries of weights (B, H, L, S) that are there already."""
    weights, keys = F.pad(p, (0, max(summary.top - p.shape[-1], 0))).topk(summary.top, -1)
    return Seen(
        max=p.amax(-1),
        entropy=-(p * torch.log(torch.where(p > 0, p, 1.0))).sum(-1) if summary.entropy else None,
        top=Top(weights, keys.masked_fill(weights == 0, -1)),
        received=p.sum(-2) if summary.received else None,
        rows=p[..., list(summary.row_numbers), :] if summary.row_numbers else None,
    )


def _forbids_later(mask: Mask | None) -> bool:
    """Does a mask of ours forbid every later key?"""
    if isinstance(mask, masks.And):
        return _forbids_later(mask.left) or _forbids_later(mask.right)
    return isinstance(mask, masks.Band) and mask.right == 0


def _each(seen: Seen, change: Callable[[Tensor], Tensor]) -> Seen:
    """The summaries, each changed alike."""
    top = seen.top and Top(*map(change, seen.top))
    return seen._replace(top=top, **{name: change(x) for name, x in seen._asdict().items() if isinstance(x, Tensor)})
