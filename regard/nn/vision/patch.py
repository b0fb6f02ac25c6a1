"""Self-attention among the patches of a map."""

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
    """x + MSA(LayerNorm(patches of x, with positions)): the patches of a map, p x p places each, attend to one another.
    It starts as the identity: the last map is 0 at first.

    A patch is a token of all its C p^2 numbers. A map whose sides are no multiples of p is filled up with zeros at the right
    and at the bottom; no patch is of zeros alone.

    Args:
        channels: C, those of the map.
        num_heads: how many heads; a divisor of the width.
        patch: p, the side of a patch.
        width: that of queries, keys and values, all heads together; C by default.
        position: a `Rotary2d` (of the width of a head or less), which turns q and k; a `RelativeBias2d`, added to the
            scores; or any module that adds positions to a map, which is called with the map of patches (B, C p^2,
            H/p, W/p). `Sinusoidal2d()` by default; `nn.Identity()` for none.
        score: one of `regard.score`, `ScaledDot()` by default. Its parameters are learned.
        normalizer: one of `regard.normalizer`, `Softmax()` by default. Its parameters are learned.

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
        check.whole("PatchAttention: channels", channels, 1)
        check.whole("PatchAttention: patch", patch, 1)
        width = channels if width is None else width
        check.whole("PatchAttention: width", width, 1, ", or None for the channels")
        check_heads("PatchAttention", num_heads, width)
        if position is not None and not isinstance(position, nn.Module):
            raise check.wrong("PatchAttention: position", position, "a module, or None for Sinusoidal2d()", False)
        if isinstance(position, Rotary2d) and position.width > width // num_heads:
            raise ValueError(
                f"PatchAttention: position turns {position.width} entries of each head; expected no more than "
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
        """From x (B, C, H, W) to the same shape. With `summary`, a pair of it and `AttentionSummary`, (B, heads, N): its queries and
        keys are the N patches, row by row.
        """
        check_map("PatchAttention: x", x, self.channels)
        H, W = x.shape[2:]
        patches = _unshuffle(F.pad(x, (0, -W % self.patch, 0, -H % self.patch)), self.patch)
        size = patches.shape[2:]
        turn = bias = None
        if isinstance(self.position, Rotary2d):
            turn = partial(self.position, height=size[0], width=size[1])
        elif isinstance(self.position, RelativeBias2d):
            bias = self.position(*size)
        else:
            patches = self.position(patches)
        y, seen = self.attention(to_tokens(patches), turn=turn, bias=bias, summary=summary)
        out = x + _shuffle(to_map(y, *size), self.patch)[..., :H, :W]
        return out if seen is None else (out, seen)


# Not torch's `pixel_unshuffle` and `pixel_shuffle`: of an empty batch, they give another shape.


def _unshuffle(x: Tensor, p: int) -> Tensor:
    """(B, C, H p, W p) -> (B, C p^2, H, W)."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 1, 3, 5, 2, 4).reshape(B, C * p * p, H // p, W // p)


def _shuffle(x: Tensor, p: int) -> Tensor:
    """The inverse of `_unshuffle`."""
    B, C, H, W = x.shape
    return x.reshape(B, C // p**2, p, p, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // p**2, H * p, W * p)
