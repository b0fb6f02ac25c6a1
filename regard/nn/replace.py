"""Replacement of the attention of existing models."""

from __future__ import annotations

import sys
import warnings
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from regard import check
from regard.nn.multihead import MultiheadAttention
from regard.nn.transformers import Registered, register

M = TypeVar("M", bound=nn.Module)


def replace_attention(model: M) -> M:
    """Replace all attention of a model by that of `regard`, in place. Outputs stay the same up to rounding.

    Every `nn.MultiheadAttention`, including those in `nn.Transformer`, becomes a `regard.nn.MultiheadAttention`: the
    same object with the same parameters. Subclasses, and layers with `torch.nn.utils.parametrize`, are left as they are; a
    warning names them. In Hugging Face models, the attention
    implementation becomes "regard", as by `model.set_attn_implementation("regard")`.
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
    kept = _kept_layers(model)
    if not layers and not pretrained:
        other = f" ({kept})" if kept else ""
        raise ValueError(
            f"replace_attention: {type(model).__name__} has no attention that can be replaced{other}; expected a "
            "torch.nn.MultiheadAttention or a Hugging Face model"
        )
    if kept:
        warnings.warn(f"replace_attention: {kept}", stacklevel=2)
    for layer in layers:
        layer.__class__ = MultiheadAttention
        cast(MultiheadAttention, layer)._set_components()
    for module in model.modules():
        if layers and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if pretrained:
        register()
    for part in pretrained:
        part.set_attn_implementation("regard")
        part._regard = Registered()
    return model


def _kept_layers(model: nn.Module) -> str:
    """Return which layers of torch are not replaced, and why; an empty string if there are none."""
    kept = [
        f"{name or 'the model'} ({'parametrized' if is_parametrized(module) else f'of class {type(module).__name__}'})"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module) is not nn.MultiheadAttention
        and not isinstance(module, MultiheadAttention)
    ]
    if not kept:
        return ""
    return f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} not replaced"


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
