"""Conversion of the masks of `torch.nn` to `regard.mask` and biases of the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard import check
from regard.components.mask import Band, Mask, causal, dense, lengths
from regard.components.position import Bias
from regard.components.tile import Sizes, Tile
from regard.plan.arguments import resolve_alignment
from regard.tracing import has_values


def convert_masks(
    size: Sizes,
    batch: tuple[int, ...],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    past: int,
) -> tuple[list[Mask], list[Tensor]]:
    """Convert torch's masks. Return a list of masks, and a list of biases that broadcast to (B, H, L, S).

    With `attn_mask`, `is_causal` is a hint that this is the causal mask, as in torch: the mask is read.
    """
    masks: list[Mask] = []
    added: list[Tensor] = []
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, ((size.L, size.S), (size.B * size.H, size.L, size.S)))
        table = attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(size.B, size.H, size.L, size.S)
        forbidden = _to_bools(table)
        if forbidden is None:
            added.append(table)
        elif is_causal and _is_causal(forbidden):
            masks.append(causal("start"))
        else:
            masks.append(dense(~forbidden))
    elif is_causal:
        masks.append(Band(None, 0, None if size.L == size.S else past))
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, ((*batch, size.S),))
        table = key_padding_mask.reshape(size.B, size.S)
        forbidden = _to_bools(table)
        if forbidden is None:
            added.append(table[:, None, None])
        else:
            masks += _convert_padding(forbidden)
    return masks, added


def _check_mask(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    fits = check.is_bool_tensor(x) or check.is_float_tensor(x)
    if not fits or not check.is_one_of(x.shape, shapes):
        expected = "a bool (True = may not attend) or float tensor of shape " + " or ".join(map(str, shapes))
        raise check.error(f"MultiheadAttention: {name}", x, expected, fits)


def _is_cheap_to_read(x: Tensor) -> bool:
    """Return whether elements of `x` can be read without a device synchronization or a graph break."""
    return x.device.type == "cpu" and has_values(x)


def _to_bools(x: Tensor) -> Tensor | None:
    """Return a mask of torch as bools, True = may not attend, or None if it is a float mask with elements other than 0
    and -inf, or one whose elements are not read. The layers of nn.Transformer convert bool masks to 0 and -inf.
    """
    if x.dtype == torch.bool:
        return x
    if x.requires_grad or not _is_cheap_to_read(x):
        return None
    forbidden = x == -math.inf
    return forbidden if bool((forbidden | (x == 0)).all()) else None


def _is_causal(forbidden: Tensor) -> bool:
    """Return whether a mask (..., L, S), True = may not attend, is causal with query 0 at key 0; False if it is not read."""
    return _is_cheap_to_read(forbidden) and torch.equal(forbidden, torch.ones_like(forbidden).triu(1))


def _convert_padding(forbidden: Tensor) -> list[Mask]:
    """Return the masks for padded keys (B, S), True = padding: the cheaper `lengths` if all padding is at the end."""
    allowed = ~forbidden
    if _is_cheap_to_read(forbidden):
        n = allowed.sum(-1)
        if torch.equal(torch.arange(forbidden.shape[1]) < n[:, None], allowed):
            return [lengths(n)] if bool(forbidden.any()) else []
    return [dense(allowed[:, None, None])]


def materialize_masks(
    mask: Mask | None, bias: Tensor | Bias | None, size: Sizes, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Materialize a mask and a bias as tensors that broadcast to (B, H, L, S), for the dtype and device of `like`."""
    tile = Tile((0, size.B), (0, size.H), (0, size.L), (0, size.S), size, like.device)
    mask, aligned = resolve_alignment(mask, None if isinstance(bias, Tensor) else bias, size)
    table = None
    if mask is not None:
        mask.check(size, like.device)
        table = mask.allowed(tile)
        table = table.expand(*table.shape[:-1], size.S)
    if aligned is not None:
        aligned.check(size)
        bias = aligned.bias(tile, torch.promote_types(like.dtype, torch.float32))
    assert not isinstance(bias, Bias)
    return table, None if bias is None else bias.expand(*bias.shape[:-1], size.S)
