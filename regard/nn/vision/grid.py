"""Helpers of the vision layers: argument checks, and conversion of maps (B, C, H, W) to tokens (B, H W, C) and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard import check
from regard.attention import attention
from regard.components.summary import AttentionSummary, Summary


def check_map(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raise unless `x` is a float tensor (B, C, H, W) with C = channels (any C if None) and nonzero H and W."""
    fits = check.is_float_tensor(x)
    if not fits or x.dim() != 4 or channels not in (None, x.shape[1]) or not x.shape[2] or not x.shape[3]:
        C = "C" if channels is None else channels
        raise check.error(name, x, f"a float tensor of shape (B, {C}, H, W) with H and W > 0", fits)


def check_heads(name: str, num_heads: object, width: int) -> None:
    """Raise unless `num_heads` is a divisor of `width`."""
    if not check.is_int(num_heads) or num_heads < 1 or width % num_heads:
        raise check.error(f"{name}: num_heads", num_heads, f"a divisor of the width, {width}", check.is_int(num_heads))


def to_pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """Return a pair (rows, columns) from a pair, or from one integer for both."""
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2 or not all(check.is_int(side) and side >= minimum for side in sides):
        fits = all(check.is_int(side) for side in sides)
        raise check.error(name, value, f"an integer >= {minimum}, or a pair (rows, columns)", fits)
    return sides


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), row-major."""
    return x.flatten(2).mT


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.mT.reshape(tokens.shape[0], tokens.shape[2], height, width)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., N, heads D) -> (..., heads, N, D)."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(-3, -2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, summary: Summary | None, **arguments: Any
) -> tuple[Tensor, AttentionSummary | None]:
    """Compute attention of q (..., heads, L, D), k (..., heads, S, D), v (..., heads, S, E), and concatenate the heads.

    Returns:
        The output (..., L, heads E), and an `AttentionSummary`, or None without `summary`.
    """
    if summary is None:
        out, statistics = attention(q, k, v, **arguments), None
    else:
        out, statistics = attention(q, k, v, summary=summary, **arguments)
    return out.transpose(-3, -2).flatten(-2), statistics
