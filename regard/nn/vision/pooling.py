"""Attention pooling of a map."""

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
    """Attention pooling: one query attends to all positions of a map, (B, C, H, W) -> (B, out).

    Args:
        channels: number of channels C of the map.
        num_heads: number of heads, a divisor of C.
        out: width of the result; C by default.
        mean: True: the query is the mean over all positions plus a learned vector, and is also the first key and value,
            as in CLIP. False: the query is the learned vector, and the keys are the positions.
        position: a module that adds positions to the map. `Sinusoidal2d()` by default; `Learned2d` as in CLIP (where
            the mean is taken before positions are added); `nn.Identity()` for none.
        score: one of `regard.score`; `ScaledDot()` by default. Its parameters are learned.
        normalizer: one of `regard.normalizer`; `Softmax()` by default. Its parameters are learned.

    >>> pool = regard.nn.vision.AttentionPool2d(8, num_heads=2, out=3, mean=False, position=nn.Identity())
    >>> x = torch.randn(2, 8, 3, 4)
    >>> out, statistics = pool(x, summary=Summary(full=True))
    >>> out.shape, statistics.full.shape
    (torch.Size([2, 3]), torch.Size([2, 2, 1, 12]))
    >>> torch.allclose(out, pool(x.flip(3)), atol=1e-6)  # without positions, the order does not matter
    True

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
        check.integer("AttentionPool2d: channels", channels, 1)
        check_heads("AttentionPool2d", num_heads, channels)
        out = channels if out is None else out
        check.integer("AttentionPool2d: out", out, 1, ", or None for the channels")
        adds = isinstance(position, nn.Module) and not isinstance(position, Rotary2d | RelativeBias2d)
        if position is not None and not adds:
            expected = "a module that adds positions to a map, or None for Sinusoidal2d()"
            raise check.error("AttentionPool2d: position", position, expected, False)
        self.channels, self.num_heads, self.mean = channels, num_heads, mean
        self.position = Sinusoidal2d() if position is None else position
        self.query = nn.Parameter(torch.randn(channels) * channels**-0.5)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, out)
        self.score, self.normalizer = ComponentModule(score), ComponentModule(normalizer)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Map x (B, C, H, W) to (B, out). With `summary`, return a pair of it and an `AttentionSummary` of one query,
        (B, heads, 1). Its keys are the positions in row-major order. With `mean`, the mean is the first key, so
        position (r, c) is key 1 + r W + c.
        """
        check_map("AttentionPool2d: x", x, self.channels)
        tokens = to_tokens(self.position(x))
        if self.mean:
            query = x.mean((2, 3))[:, None] + self.query
            tokens = torch.cat([query, tokens], 1)
        else:
            query = self.query.expand(x.shape[0], 1, -1)
        q, k, v = (split_heads(y, self.num_heads) for y in (self.q(query), self.k(tokens), self.v(tokens)))
        pooled, statistics = attend(q, k, v, summary, score=self.score(), normalizer=self.normalizer())
        pooled = self.out(pooled[:, 0])
        return pooled if statistics is None else (pooled, statistics)
