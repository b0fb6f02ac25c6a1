"""Self-attention over patches of a map."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.nn.vision.grid import check_heads, check_map, to_map, to_tokens
from regard.nn.vision.position import RelativeBias2d, Rotary2d, Sinusoidal2d
from regard.nn.vision.self_attention import SelfAttention


class PatchAttention(nn.Module):
    """Self-attention over patches of p x p positions: x + MSA(LayerNorm(patches of x, with positions)).

    The layer is initialized as the identity: the output projection starts at 0. A patch is one token of width C p^2. A
    map whose sides are not multiples of p is padded with zeros at the right and at the bottom.

    Args:
        channels: number of channels C of the map.
        num_heads: number of heads, a divisor of width.
        patch: side p of a patch.
        width: width of queries, keys and values, over all heads; C by default.
        position: a `Rotary2d` (at most as wide as a head), which rotates q and k; a `RelativeBias2d`, added to the
            scores; or any module that adds positions to a map, which is called with the map of patches (B, C p^2, H/p,
            W/p). `Sinusoidal2d()` by default; `nn.Identity()` for none.
        score: one of `regard.score`; `ScaledDot()` by default. Its parameters are learned.
        normalizer: one of `regard.normalizer`; `Softmax()` by default. Its parameters are learned.

    >>> layer = regard.nn.vision.PatchAttention(8, num_heads=2, patch=2)
    >>> x = torch.randn(2, 8, 5, 7)
    >>> out, statistics = layer(x, summary=Summary(entropy=True))  # 3 x 4 patches
    >>> torch.equal(out, x), statistics.entropy.shape
    (True, torch.Size([2, 2, 12]))

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equations 1 and 2.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        patch: int = 1,
        *,
        width: int | None = None,
        position: nn.Module | None = None,
        score: Score | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        super().__init__()
        check.integer("PatchAttention: channels", channels, 1)
        check.integer("PatchAttention: patch", patch, 1)
        width = channels if width is None else width
        check.integer("PatchAttention: width", width, 1, ", or None for the channels")
        check_heads("PatchAttention", num_heads, width)
        if position is not None and not isinstance(position, nn.Module):
            raise check.error("PatchAttention: position", position, "a module, or None for Sinusoidal2d()", False)
        if isinstance(position, Rotary2d) and position.width > width // num_heads:
            raise ValueError(
                f"PatchAttention: position rotates {position.width} elements of each head; expected at most "
                f"{width // num_heads}, the width of a head"
            )
        if isinstance(position, RelativeBias2d) and position.table.shape[1] != num_heads:
            raise ValueError(
                f"PatchAttention: position has a table for {position.table.shape[1]} heads; expected {num_heads}"
            )
        self.channels, self.patch = channels, patch
        self.position = Sinusoidal2d() if position is None else position
        self.attention = SelfAttention(channels * patch**2, width, num_heads, score, normalizer)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Map x (B, C, H, W) to the same shape. With `summary`, return a pair of it and an `AttentionSummary`, (B,
        heads, N), whose queries and keys are the N patches in row-major order.
        """
        check_map("PatchAttention: x", x, self.channels)
        H, W = x.shape[2:]
        patches = _unshuffle(F.pad(x, (0, -W % self.patch, 0, -H % self.patch)), self.patch)
        size = patches.shape[2:]
        rotate = bias = None
        if isinstance(self.position, Rotary2d):
            rotate = partial(self.position, height=size[0], width=size[1])
        elif isinstance(self.position, RelativeBias2d):
            bias = self.position(*size)
        else:
            patches = self.position(patches)
        y, statistics = self.attention(to_tokens(patches), rotate=rotate, bias=bias, summary=summary)
        out = x + _shuffle(to_map(y, *size), self.patch)[..., :H, :W]
        return out if statistics is None else (out, statistics)


# torch's `pixel_unshuffle` and `pixel_shuffle` return another shape for an empty batch.


def _unshuffle(x: Tensor, p: int) -> Tensor:
    """(B, C, H p, W p) -> (B, C p^2, H, W)."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 1, 3, 5, 2, 4).reshape(B, C * p * p, H // p, W // p)


def _shuffle(x: Tensor, p: int) -> Tensor:
    """Invert `_unshuffle`."""
    B, C, H, W = x.shape
    return x.reshape(B, C // p**2, p, p, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // p**2, H * p, W * p)
