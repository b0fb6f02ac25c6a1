"""Self-attention over tokens, shared by the patch and window layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from regard.components.mask import Mask
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.nn.component import ComponentModule
from regard.nn.vision.grid import attend, split_heads

# Rotates q and k (..., heads, N, D).
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SelfAttention(nn.Module):
    """LayerNorm, projection to q, k and v, multi-head attention, and output projection: tokens (..., N, C) -> (..., N,
    C).

    Args:
        width: width C of the tokens.
        inner: width of queries, keys and values, over all heads.
        num_heads, score, normalizer: as in `PatchAttention`.
    """

    def __init__(
        self, width: int, inner: int, num_heads: int, score: Score | None = None, normalizer: Normalizer | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)
        # The layer adds this output to its input, and so starts as the identity.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.score, self.normalizer = ComponentModule(score), ComponentModule(normalizer)

    def forward(
        self,
        x: Tensor,
        *,
        rotate: Rotate | None = None,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        summary: Summary | None = None,
    ) -> tuple[Tensor, AttentionSummary | None]:
        """Return the output (..., N, C) and an `AttentionSummary`, or None. `rotate` is applied to q and k."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if rotate is not None:
            q, k = rotate(q, k)
        arguments = {"score": self.score(), "normalizer": self.normalizer(), "mask": mask, "bias": bias}
        out, statistics = attend(q, k, v, summary, **arguments)
        return self.out(out), statistics
