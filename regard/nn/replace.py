"""Have a model that exists already compute its attention here."""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import causal, dense
from regard.components.normalizer import Softmax
from regard.components.score import ScaledDot
from regard.components.summary import Summary
from regard.nn.multihead import MultiheadAttention

M = TypeVar("M", bound=nn.Module)


def replace_attention(model: M) -> M:
    """Have all attention of a model computed by `regard`, in place; its outputs stay what they are, within rounding.

    Every `nn.MultiheadAttention`, those inside of `nn.Transformer` too, becomes a `regard.nn.MultiheadAttention`: the same
    object with the same parameters. Subclasses of it are left alone. In models of Hugging Face, the attention
    implementation becomes "regard", as `model.set_attn_implementation("regard")` does from then on; that serves grouped
    heads, sliding windows, softcaps, sinks, position biases and caches.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        ValueError: there is no attention in it that can be replaced, or a Hugging Face model computes its attention by
            itself, past the interface that implementations are chosen by. Nothing was changed then.
    """
    if not isinstance(model, nn.Module):
        raise check.wrong("replace_attention: model", model, "a torch.nn.Module", False)
    layers = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    pretrained = _pretrained(model)
    if not layers and not pretrained:
        raise ValueError(
            f"replace_attention: there is no attention in {type(model).__name__} that can be replaced; expected a "
            "torch.nn.MultiheadAttention, or a model of Hugging Face"
        )
    for layer in layers:
        layer.__class__ = MultiheadAttention
        cast(MultiheadAttention, layer)._take()
    for module in model.modules():
        if layers and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if pretrained:
        _register()
    for part in pretrained:
        part.set_attn_implementation("regard")
    return model


def _pretrained(model: nn.Module) -> list[Any]:
    """The Hugging Face models in a model that have attention. Raise where one cannot be told to use ours."""
    if "transformers" not in sys.modules:
        return []  # then no object of its classes exists
    from transformers import PreTrainedModel

    found, refused = [], []
    for part in model.modules():
        kind = type(part)
        if isinstance(part, PreTrainedModel) and any(_is_attention(inner, kind) for inner in part.modules()):
            found.append(part)
            if not (part._can_set_attn_implementation() and (part._supports_sdpa or part._supports_attention_backend)):
                refused.append(kind.__name__)
    if refused:
        raise ValueError(
            f"replace_attention: {' and '.join(dict.fromkeys(refused))} cannot be told how to compute attention; expected "
            "models that go by the AttentionInterface of transformers"
        )
    return found


def _is_attention(module: nn.Module, model: type) -> bool:
    """Is it a layer of attention that was written for this class of models?"""
    return "Attention" in type(module).__name__ and type(module).__module__ == model.__module__


def _register() -> None:
    """Make "regard" an implementation of attention that models of Hugging Face may be set to."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("regard", _attend)
    # Without this one, models would drop the masks of padded tokens, and say nothing.
    AttentionMaskInterface.register("regard", _mask)


def _mask(*, allow_is_causal_skip: bool = True, **words: Any) -> Tensor | None:
    """The mask as torch's attention takes it: bool (B, 1, L, S), True = may attend; None where all may attend, and for a
    causal mask with as many queries as keys, or one query.
    """
    from transformers.masking_utils import sdpa_mask

    plain = words["q_length"] in (1, words["kv_length"])
    mask: Tensor | None = sdpa_mask(allow_is_causal_skip=allow_is_causal_skip and plain, **words)
    return mask


# What some models hand to implementations that know it, and build into the mask for torch's.
_UNKNOWN = ("indices", "block_indices", "sinks")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as models of Hugging Face call it: queries (B, H, L, D), keys (B, G, S, D) and values (B, G, S, E).

    Returns:
        The output (B, L, H, E), and, with `output_attentions`, the weights before dropout, (B, H, L, S).
    """
    unknown = [name for name in _UNKNOWN if others.get(name) is not None] + ["cache"] * (cache is not None)
    if unknown:
        raise ValueError(
            f"regard as the attention of {type(module).__name__}: it is asked for {', '.join(unknown)}, which it does not "
            'have; expected a model, or a way to run it, that does without: set_attn_implementation("sdpa")'
        )
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    mask, bias = None, position_bias
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if is_causal and query.shape[2] > 1:
            mask = causal("end")
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = dense(attention_mask.bool())
    words: dict[str, Any] = {
        "score": None if scaling is None else ScaledDot(scaling),
        "normalizer": None if s_aux is None else Softmax(s_aux),
    }
    words |= {"mask": mask, "bias": bias, "softcap": softcap, "dropout": dropout}
    if not output_attentions:
        return attention(query, key, value, **words).transpose(1, 2).contiguous(), None
    out, seen = attention(query, key, value, **words, summary=Summary(full=True))
    weights = seen.full
    assert weights is not None
    return out.transpose(1, 2).contiguous(), weights.to(query.dtype)
