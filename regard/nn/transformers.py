"""The attention implementation "regard" of Hugging Face Transformers.

It is registered when both packages are imported, in either order: `from_pretrained(..., attn_implementation="regard")`
and `model.set_attn_implementation("regard")` select it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.attention import attention
from regard.components.mask import causal, dense
from regard.components.normalizer import Softmax
from regard.components.score import ScaledDot
from regard.components.summary import Summary
from regard.on_import import on_import

_MODULE = "transformers.modeling_utils"  # the one that holds the table of implementations


def register() -> None:
    """Register the attention implementation "regard" with transformers, which this imports.

    Importing `regard` does so as soon as transformers are imported, too.

    >>> import transformers
    >>> regard.nn.register()
    >>> config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="regard")
    >>> model.config._attn_implementation
    'regard'
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("regard", _attend)
    # Without a mask function, models would silently drop the masks of padded tokens.
    AttentionMaskInterface.register("regard", _make_mask)


def register_on_import() -> None:
    """Register now if transformers are imported, otherwise as soon as they are."""
    on_import(_MODULE, register)


class Registered:
    """An attribute of models whose attention is that of `regard`: unpickling it registers the implementation, so that models
    can be loaded in processes that did not import `regard`.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, ()


def _restore() -> Registered:
    register()
    return Registered()


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
