"""Non-local block: global self-attention over the positions of a map."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from regard import check
from regard.components.score import Dot
from regard.components.summary import AttentionSummary, Summary
from regard.nn.vision.grid import attend, check_map, to_map, to_tokens


class NonLocalBlock(nn.Module):
    """z_i = W_z y_i + x_i, with y_i = sum_j softmax_j(theta(x_i) . phi(x_j)) g(x_j), over all positions i and j of the
    map.

    The block is initialized as the identity.

    Args:
        channels: number of channels C of the map.
        width: number of channels of theta, phi and g; by default half of C, at least 1.
        score: "embedded_gaussian": theta and phi are 1x1 convolutions. "gaussian": they are the identity. (The paper's
            "dot product" and "concatenation" divide by N instead of a softmax, for which there is no normalizer.)
        pool: whether keys and values come from the map after 2x2 max pooling, which takes a quarter of the operations.
            A last odd row or column is pooled too.
        norm: whether W_z is followed by batch norm, whose scale is initialized to 0. Without it, W_z is initialized to
            0.

    >>> block = regard.nn.vision.NonLocalBlock(8, norm=False)
    >>> x = torch.randn(2, 8, 3, 4)
    >>> out, statistics = block(x, summary=Summary(full=True))
    >>> torch.equal(out, x), statistics.full.shape
    (True, torch.Size([2, 1, 12, 12]))
    >>> theta, phi = block.theta(x)[0].flatten(1), block.phi(x)[0].flatten(1)
    >>> torch.allclose(statistics.full[0, 0], (theta.T @ phi).softmax(-1), atol=1e-6)
    True

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
        check.integer("NonLocalBlock: channels", channels, 1)
        width = max(channels // 2, 1) if width is None else width
        check.integer("NonLocalBlock: width", width, 1, ", or None for half of the channels")
        if score not in ("embedded_gaussian", "gaussian"):
            expected = '"embedded_gaussian" or "gaussian"'
            raise check.error("NonLocalBlock: score", score, expected, isinstance(score, str))
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
        """Map x (B, C, H, W) to the same shape. With `summary`, return a pair of it and an `AttentionSummary` of one
        head, (B, 1, H W). Its queries are the positions of the map in row-major order; its keys are those of the map or
        pooled map.
        """
        check_map("NonLocalBlock: x", x, self.channels)
        source = self.pool(x)
        q, k, v = (to_tokens(y)[:, None] for y in (self.theta(x), self.phi(source), self.g(source)))
        y, statistics = attend(q, k, v, summary, score=Dot())
        out = x + self.norm(self.w_z(to_map(y, *x.shape[2:])))
        return out if statistics is None else (out, statistics)
