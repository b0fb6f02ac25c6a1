"""Self-attention within windows of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.components.mask import documents
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.nn.vision.grid import check_heads, check_map, pair
from regard.nn.vision.position import RelativeBias2d
from regard.nn.vision.self_attention import SelfAttention


class WindowAttention2d(nn.Module):
    """x + W-MSA(LayerNorm(x)): each place attends to those of its window, with a learned bias for how far apart they are.
    The work grows with the size of the map, not with its square. It starts as the identity: the last map is 0 at first.

    With a shift, the map is rolled so far up and to the left before it is cut into windows, and what comes in at the other
    side is kept apart by a mask. Along a side with one window, nothing is shifted. A map whose sides are no multiples of
    the window is filled up at the right and at the bottom with places that no other attends to.

    Args:
        channels: C, those of the map.
        num_heads: how many heads; a divisor of C.
        window: height and width of a window, a pair, or one number for both.
        shift: by how much windows are shifted, down and to the right; half a window in every other layer of the paper.
        score: one of `regard.score`, `ScaledDot()` by default. Its parameters are learned. (Swin V2 has
            `Cosine`, with a temperature per head.)
        normalizer: one of `regard.normalizer`, `Softmax()` by default. Its parameters are learned.

    Source: Liu et al., "Swin Transformer" (2021), section 3.2, equations 3 and 4.

    >>> nn.Sequential(WindowAttention2d(96, 3), WindowAttention2d(96, 3, shift=3))
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] = 0,
        *,
        score: Score | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        super().__init__()
        check.whole("WindowAttention2d: channels", channels, 1)
        check_heads("WindowAttention2d", num_heads, channels)
        self.window = pair("WindowAttention2d: window", window, 1)
        self.shift = pair("WindowAttention2d: shift", shift, 0)
        if any(shifted >= side for shifted, side in zip(self.shift, self.window, strict=True)):
            raise check.wrong("WindowAttention2d: shift", shift, f"less than the window, {window}", True)
        self.channels = channels
        self.bias = RelativeBias2d(num_heads, self.window)
        self.attention = SelfAttention(channels, channels, num_heads, score, normalizer)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """From x (B, C, H, W) to the same shape. With `summary`, a pair of it and `AttentionSummary`, (B, windows, heads, N): the
        windows row by row, and the N places of each row by row, of the map as it is filled up and rolled.
        """
        check_map("WindowAttention2d: x", x, self.channels)
        B, _, H, W = x.shape
        # In a map smaller than the window, it is the map: the bias knows distances alone.
        h, w = min(self.window[0], H), min(self.window[1], W)
        down, right = self.shift[0] if h < H else 0, self.shift[1] if w < W else 0
        below, beside = -H % h, -W % w

        def cut(y: Tensor) -> Tensor:
            y = y.roll((-down, -right), (2, 3)) if down or right else y
            return _to_windows(y, h, w)

        mask = None
        if down or right or below or beside:
            mask = documents(cut(_regions(x, down, right, below, beside))[..., 0].expand(B, -1, -1).flatten(0, 1))
        windows = cut(F.pad(x, (0, beside, 0, below)))
        y, seen = self.attention(windows, mask=mask, bias=self.bias(h, w), summary=summary)
        y = _from_windows(y, h, w, (H + below) // h)
        y = y.roll((down, right), (2, 3)) if down or right else y
        out = x + y[..., :H, :W]
        return out if seen is None else (out, seen)


def _regions(x: Tensor, down: int, right: int, below: int, beside: int) -> Tensor:
    """Which places of the map, filled up, may attend to each other in a window: numbers (1, 1, H, W). What is rolled over to
    the other side is apart, and so is what it was filled up with.
    """
    H, W = x.shape[2:]
    row, column = torch.arange(H + below, device=x.device)[:, None], torch.arange(W + beside, device=x.device)
    region = (row < down) * 2 + (column < right)
    return region.masked_fill((row >= H) | (column >= W), 4)[None, None]


def _to_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B, C, rows h, columns w) -> (B, rows columns, h w, C)."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _from_windows(windows: Tensor, h: int, w: int, rows: int) -> Tensor:
    """The inverse of `_to_windows`."""
    B, count, _, C = windows.shape
    x = windows.reshape(B, rows, count // rows, h, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
