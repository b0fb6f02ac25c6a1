"""Self-attention among tokens, as the layers of patches and of windows use it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from regard.components.mask import Mask
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.nn.component import ComponentModule
from regard.nn.vision.grid import attend, split_heads

# Turns q and k (..., heads, N, D).
Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SelfAttention(nn.Module):
    """LayerNorm, the maps to queries, keys and values, attention, and the map back: tokens (..., N, C) -> (..., N, C).

    Args:
        width: C.
        inner: the width of all queries of a token, and so of its keys and values; each of the heads takes its share.
        num_heads, score, normalizer: as the layers have them.
    """

    def __init__(
        self, width: int, inner: int, num_heads: int, score: Score | None = None, normalizer: Normalizer | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)
        # So that the layer, which adds this to its input, starts as the identity.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.score, self.normalizer = ComponentModule(score), ComponentModule(normalizer)

    def forward(
        self,
        x: Tensor,
        *,
        turn: Turn | None = None,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        summary: Summary | None = None,
    ) -> tuple[Tensor, AttentionSummary | None]:
        """From x (..., N, C) to the same shape, and what was seen; `turn` is applied to q and k (..., heads, N, D) first."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if turn is not None:
            q, k = turn(q, k)
        words = {"score": self.score(), "normalizer": self.normalizer(), "mask": mask, "bias": bias}
        out, seen = attend(q, k, v, summary, **words)
        return self.out(out), seen
