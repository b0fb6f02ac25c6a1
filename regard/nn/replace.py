"""Replacement of the attention of existing models."""

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
    """Replace all attention of a model by that of `regard`, in place. Outputs stay the same up to rounding.

    Every `nn.MultiheadAttention`, including those in `nn.Transformer`, becomes a `regard.nn.MultiheadAttention`: the
    same object with the same parameters. Subclasses are not replaced. In Hugging Face models, the attention
    implementation becomes "regard", as by `model.set_attn_implementation("regard")`, which is available from then on.
    It supports grouped heads, sliding windows, softcaps, sinks, position biases and caches.

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2).eval()
    >>> x = torch.randn(2, 5, 16)
    >>> before = model(x)
    >>> model = regard.nn.replace_attention(model)
    >>> type(model.layers[0].self_attn).__module__, torch.allclose(model(x), before, atol=1e-5)
    ('regard.nn.multihead', True)

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        ValueError: the model has no attention that can be replaced, or it contains a Hugging Face model whose attention
            implementation cannot be selected. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise check.error("replace_attention: model", model, "a torch.nn.Module", False)
    layers = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    pretrained = _pretrained(model)
    if not layers and not pretrained:
        raise ValueError(
            f"replace_attention: {type(model).__name__} has no attention that can be replaced; expected a "
            "torch.nn.MultiheadAttention or a Hugging Face model"
        )
    for layer in layers:
        layer.__class__ = MultiheadAttention
        cast(MultiheadAttention, layer)._set_components()
    for module in model.modules():
        if layers and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if pretrained:
        _register()
    for part in pretrained:
        part.set_attn_implementation("regard")
    return model


def _pretrained(model: nn.Module) -> list[Any]:
    """Return the Hugging Face models in `model`. Raise if the attention of one cannot be selected."""
    if "transformers" not in sys.modules:
        return []  # no object of its classes can exist
    from transformers import PreTrainedModel

    found, unsupported = [], []
    for part in model.modules():
        kind = type(part)
        if isinstance(part, PreTrainedModel) and any(_is_attention(inner, kind) for inner in part.modules()):
            found.append(part)
            if not (part._can_set_attn_implementation() and (part._supports_sdpa or part._supports_attention_backend)):
                unsupported.append(kind.__name__)
    if unsupported:
        raise ValueError(
            f"replace_attention: {' and '.join(dict.fromkeys(unsupported))} cannot select an attention "
            "implementation; expected models that use the AttentionInterface of transformers"
        )
    return found


def _is_attention(module: nn.Module, model: type) -> bool:
    """Return whether `module` is an attention layer defined in the same file as the class `model`."""
    return "Attention" in type(module).__name__ and type(module).__module__ == model.__module__


def _register() -> None:
    """Register the attention implementation "regard" with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("regard", _attend)
    # Without a mask function, models would silently drop the masks of padded tokens.
    AttentionMaskInterface.register("regard", _make_mask)


def _make_mask(*, allow_is_causal_skip: bool = True, **arguments: Any) -> Tensor | None:
    """Return the mask as for torch's attention: bool (B, 1, L, S), True = may attend. Return None if all keys may be
    attended to, and for a causal mask with as many queries as keys or with one query.
    """
    from transformers.masking_utils import sdpa_mask

    can_skip = arguments["q_length"] in (1, arguments["kv_length"])
    mask: Tensor | None = sdpa_mask(allow_is_causal_skip=allow_is_causal_skip and can_skip, **arguments)
    return mask


# Arguments that some models pass to implementations that support them, and otherwise include in the mask.
_UNSUPPORTED = ("indices", "block_indices", "sinks")


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
    """Compute attention with the signature of Hugging Face: queries (B, H, L, D), keys (B, G, S, D), values (B, G, S,
    E).

    Returns:
        The output (B, L, H, E), and with `output_attentions` the weights before dropout (B, H, L, S), otherwise None.
    """
    unsupported_arguments = [name for name in _UNSUPPORTED if others.get(name) is not None] + ["cache"] * (
        cache is not None
    )
    if unsupported_arguments:
        raise ValueError(
            f"regard as the attention of {type(module).__name__}: {', '.join(unsupported_arguments)} is not supported; "
            'expected a model without it, or another implementation: set_attn_implementation("sdpa")'
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
    arguments: dict[str, Any] = {
        "score": None if scaling is None else ScaledDot(scaling),
        "normalizer": None if s_aux is None else Softmax(s_aux),
    }
    arguments |= {"mask": mask, "bias": bias, "softcap": softcap, "dropout": dropout}
    if not output_attentions:
        return attention(query, key, value, **arguments).transpose(1, 2).contiguous(), None
    out, statistics = attention(query, key, value, **arguments, summary=Summary(full=True))
    weights = statistics.full
    assert weights is not None
    return out.transpose(1, 2).contiguous(), weights.to(query.dtype)
