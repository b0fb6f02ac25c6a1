"""Feature maps (B, C, H, W), as tokens (B, N, C) with N = H W, row by row, and back; what the layers share besides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard import check
from regard.attention import attention
from regard.components.summary import AttentionSummary, Summary


def check_map(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raise unless `x` is a feature map (B, C, H, W) of floats with C = channels (any where None), and no side of 0."""
    fits = check.is_floats(x)
    if not fits or x.dim() != 4 or channels not in (None, x.shape[1]) or not x.shape[2] or not x.shape[3]:
        C = "C" if channels is None else channels
        raise check.wrong(name, x, f"floats of shape (B, {C}, H, W), neither H nor W being 0", fits)


def check_heads(name: str, num_heads: object, width: int) -> None:
    """Raise unless `num_heads` divides the width."""
    if not check.is_int(num_heads) or num_heads < 1 or width % num_heads:
        raise check.wrong(f"{name}: num_heads", num_heads, f"a divisor of the width, {width}", check.is_int(num_heads))


def pair(name: str, value: object, least: int) -> tuple[int, int]:
    """A size in rows and columns, from one number for both, or a pair of them."""
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2 or not all(check.is_int(side) and side >= least for side in sides):
        fits = all(check.is_int(side) for side in sides)
        raise check.wrong(name, value, f"an int >= {least}, or a pair (rows, columns)", fits)
    return sides


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).mT


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.mT.reshape(tokens.shape[0], tokens.shape[2], height, width)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., N, heads D) -> (..., heads, N, D)."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(-3, -2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, summary: Summary | None, **words: Any
) -> tuple[Tensor, AttentionSummary | None]:
    """`attention` of q (..., heads, L, D), k (..., heads, S, D), v (..., heads, S, E), the heads put side by side: (..., L,
    heads E). Always with what was seen, None where there is no summary.
    """
    if summary is None:
        out, seen = attention(q, k, v, **words), None
    else:
        out, seen = attention(q, k, v, summary=summary, **words)
    return out.transpose(-3, -2).flatten(-2), seen
