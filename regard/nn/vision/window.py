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
from regard.nn.vision.grid import check_heads, check_map, to_pair
from regard.nn.vision.position import RelativeBias2d
from regard.nn.vision.self_attention import SelfAttention


class WindowAttention2d(nn.Module):
    """Window attention with relative position bias: x + W-MSA(LayerNorm(x)). Each position attends to its window.

    The number of operations is linear in the size of the map. The layer is initialized as the identity: the output
    projection starts at 0.

    With a shift, the map is rolled up and to the left before it is partitioned into windows, and a mask separates the
    parts of a window that are not adjacent in the map. A side with a single window is not shifted. A map whose sides
    are not multiples of the window is padded at the right and at the bottom; no real position attends to padding.

    Args:
        channels: number of channels C of the map.
        num_heads: number of heads, a divisor of C.
        window: height and width of a window, a pair or one integer for both.
        shift: shift of the windows, down and to the right; half a window in every other layer of the paper.
        score: one of `regard.score`; `ScaledDot()` by default. Its parameters are learned. (Swin V2 uses `Cosine` with
            a temperature per head.)
        normalizer: one of `regard.normalizer`; `Softmax()` by default. Its parameters are learned.

    Source: Liu et al., "Swin Transformer" (2021), section 3.2, equations 3 and 4.

    >>> layer = regard.nn.vision.WindowAttention2d(8, num_heads=2, window=3)
    >>> x = torch.randn(2, 8, 6, 6, requires_grad=True)
    >>> out, statistics = layer(x, summary=Summary(entropy=True))  # 2 x 2 windows of 9 positions
    >>> torch.equal(out, x), statistics.entropy.shape
    (True, torch.Size([2, 4, 2, 9]))
    >>> _ = nn.init.normal_(layer.attention.out.weight)
    >>> layer(x)[0, :, 0, 0].sum().backward()
    >>> x.grad[0].abs().sum(0).nonzero().max().item()  # the first position depends on rows and columns 0 to 2
    2
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
        check.integer("WindowAttention2d: channels", channels, 1)
        check_heads("WindowAttention2d", num_heads, channels)
        self.window = to_pair("WindowAttention2d: window", window, 1)
        self.shift = to_pair("WindowAttention2d: shift", shift, 0)
        if any(shifted >= side for shifted, side in zip(self.shift, self.window, strict=True)):
            raise check.error("WindowAttention2d: shift", shift, f"less than the window, {window}", True)
        self.channels = channels
        self.bias = RelativeBias2d(num_heads, self.window)
        self.attention = SelfAttention(channels, channels, num_heads, score, normalizer)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Map x (B, C, H, W) to the same shape. With `summary`, return a pair of it and an `AttentionSummary`,
        (B, windows, heads, N). Windows, and the N positions in each of them, are in row-major order of the padded and
        rolled map.
        """
        check_map("WindowAttention2d: x", x, self.channels)
        B, _, H, W = x.shape
        # If the map is smaller than the window, the window is the map: the bias depends on distances only.
        h, w = min(self.window[0], H), min(self.window[1], W)
        down, right = self.shift[0] if h < H else 0, self.shift[1] if w < W else 0
        pad_rows, pad_columns = -H % h, -W % w

        def partition(y: Tensor) -> Tensor:
            y = y.roll((-down, -right), (2, 3)) if down or right else y
            return _to_windows(y, h, w)

        mask = None
        if down or right or pad_rows or pad_columns:
            regions = partition(_label_regions(x, down, right, pad_rows, pad_columns))
            mask = documents(regions[..., 0].expand(B, -1, -1).flatten(0, 1))
        windows = partition(F.pad(x, (0, pad_columns, 0, pad_rows)))
        y, statistics = self.attention(windows, mask=mask, bias=self.bias(h, w), summary=summary)
        y = _from_windows(y, h, w, (H + pad_rows) // h)
        y = y.roll((down, right), (2, 3)) if down or right else y
        out = x + y[..., :H, :W]
        return out if statistics is None else (out, statistics)


def _label_regions(x: Tensor, down: int, right: int, pad_rows: int, pad_columns: int) -> Tensor:
    """Return region numbers (1, 1, H, W) of the padded map. Positions of a window attend to each other if they have the
    same number: rows and columns that are rolled to the other side have other numbers, and so has padding.
    """
    H, W = x.shape[2:]
    row, column = torch.arange(H + pad_rows, device=x.device)[:, None], torch.arange(W + pad_columns, device=x.device)
    region = (row < down) * 2 + (column < right)
    return region.masked_fill((row >= H) | (column >= W), 4)[None, None]


def _to_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B, C, rows h, columns w) -> (B, rows columns, h w, C)."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _from_windows(windows: Tensor, h: int, w: int, rows: int) -> Tensor:
    """Invert `_to_windows`."""
    B, count, _, C = windows.shape
    x = windows.reshape(B, rows, count // rows, h, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
