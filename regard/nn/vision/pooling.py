"""From a map to one vector, by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard import check
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.nn.component import ComponentModule
from regard.nn.vision.grid import attend, check_heads, check_map, split_heads, to_tokens
from regard.nn.vision.position import RelativeBias2d, Rotary2d, Sinusoidal2d


class AttentionPool2d(nn.Module):
    """One query attends to all places of a map: (B, C, H, W) -> (B, out), in the place of global average pooling.

    Args:
        channels: C, those of the map.
        num_heads: how many heads; a divisor of C.
        out: the width of the vector; C by default.
        mean: the query is the mean of all places plus a learned vector, and is a key and a value beside the places, as
            in CLIP. Otherwise the query is the learned vector, and the places are the keys.
        position: a module that adds positions to the map first. `Sinusoidal2d()` by default; `Learned2d` as in CLIP
            (which adds positions to the places alone, as it takes the mean before); `nn.Identity()` for none.
        score: one of `regard.score`, `ScaledDot()` by default. Its parameters are learned.
        normalizer: one of `regard.normalizer`, `Softmax()` by default. Its parameters are learned.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4;
    with a learned query, Lee et al., "Set Transformer" (2019), section 3.2.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        out: int | None = None,
        *,
        mean: bool = True,
        position: nn.Module | None = None,
        score: Score | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        super().__init__()
        check.whole("AttentionPool2d: channels", channels, 1)
        check_heads("AttentionPool2d", num_heads, channels)
        out = channels if out is None else out
        check.whole("AttentionPool2d: out", out, 1, ", or None for the channels")
        adds = isinstance(position, nn.Module) and not isinstance(position, Rotary2d | RelativeBias2d)
        if position is not None and not adds:
            expected = "a module that adds positions to a map, or None for Sinusoidal2d()"
            raise check.wrong("AttentionPool2d: position", position, expected, False)
        self.channels, self.num_heads, self.mean = channels, num_heads, mean
        self.position = Sinusoidal2d() if position is None else position
        self.query = nn.Parameter(torch.randn(channels) * channels**-0.5)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, out)
        self.score, self.normalizer = ComponentModule(score), ComponentModule(normalizer)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """From x (B, C, H, W) to (B, out). With `summary`, a pair of it and `AttentionSummary`, of one query, (B, heads, 1). Its keys
        are the places row by row, after the mean where that is one: place (r, c) is then key 1 + r W + c.
        """
        check_map("AttentionPool2d: x", x, self.channels)
        places = to_tokens(self.position(x))
        if self.mean:
            query = x.mean((2, 3))[:, None] + self.query
            places = torch.cat([query, places], 1)
        else:
            query = self.query.expand(x.shape[0], 1, -1)
        q, k, v = (split_heads(y, self.num_heads) for y in (self.q(query), self.k(places), self.v(places)))
        pooled, seen = attend(q, k, v, summary, score=self.score(), normalizer=self.normalizer())
        pooled = self.out(pooled[:, 0])
        return pooled if seen is None else (pooled, seen)
