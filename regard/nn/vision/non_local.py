"""The non-local block: every place of a map attends to all of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from regard import check
from regard.components.score import Dot
from regard.components.summary import AttentionSummary, Summary
from regard.nn.vision.grid import attend, check_map, to_map, to_tokens


class NonLocalBlock(nn.Module):
    """z_i = W_z y_i + x_i, with y_i = sum_j softmax_j(theta(x_i) . phi(x_j)) g(x_j), over all places i and j.

    It starts as the identity: what W_z gives is multiplied by 0 at first.

    Args:
        channels: C, those of the map.
        width: the channels of theta, phi and g; by default half of C, at least 1.
        score: "embedded_gaussian": theta and phi are 1x1 convolutions. "gaussian": they are the identity. (The other two of
            the paper, "dot product" and "concatenation", have no softmax but divide by N, as no normalizer does.)
        pool: keys and values come from the map after max pooling 2x2: a quarter of the work. A last odd row or column
            is pooled too.
        norm: W_z is followed by batch norm, whose scale starts as 0. Without it, W_z itself starts as 0.

    Source: Wang, Girshick, Gupta, He, "Non-local Neural Networks" (2018), equations 1 to 3 and 6, sections 3.3 and 4.1.
    """

    def __init__(
        self,
        channels: int,
        width: int | None = None,
        score: Literal["embedded_gaussian", "gaussian"] = "embedded_gaussian",
        pool: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        check.whole("NonLocalBlock: channels", channels, 1)
        width = max(channels // 2, 1) if width is None else width
        check.whole("NonLocalBlock: width", width, 1, ", or None for half of the channels")
        if score not in ("embedded_gaussian", "gaussian"):
            expected = '"embedded_gaussian" or "gaussian"'
            raise check.wrong("NonLocalBlock: score", score, expected, isinstance(score, str))
        self.channels = channels
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()
        embedded = score == "embedded_gaussian"
        self.theta = nn.Conv2d(channels, width, 1) if embedded else nn.Identity()
        self.phi = nn.Conv2d(channels, width, 1) if embedded else nn.Identity()
        self.g = nn.Conv2d(channels, width, 1)
        self.w_z = nn.Conv2d(width, channels, 1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        for parameter in (self.norm if norm else self.w_z).parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, *, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """From x (B, C, H, W) to the same shape. With `summary`, a pair of it and `AttentionSummary`, for one head, (B, 1, H W): its
        queries are the places row by row, and so are its keys, those of the pooled map where there is one.
        """
        check_map("NonLocalBlock: x", x, self.channels)
        source = self.pool(x)
        q, k, v = (to_tokens(y)[:, None] for y in (self.theta(x), self.phi(source), self.g(source)))
        y, seen = attend(q, k, v, summary, score=Dot())
        out = x + self.norm(self.w_z(to_map(y, *x.shape[2:])))
        return out if seen is None else (out, seen)
