"""Channel and spatial gates: the map is multiplied by factors between 0 and 1 that depend on the map.

The literature calls them attention, but they have no queries, keys or softmax. So they do not use `regard.attention`,
and `summary=True` returns the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard import check
from regard.nn.vision.grid import check_map


class Gates(NamedTuple):
    """Gates of a layer: `channels` (B, C), and `places` (B, H, W), which is None for a layer without spatial gates.

    Each gate is between 0 and 1. Gates need not sum to 1.
    """

    channels: Tensor
    places: Tensor | None = None


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate that depends on the means of all channels.

        z = mean of x over H, W
        out = x * sigmoid(W_2 relu(W_1 z + b_1) + b_2)

    Args:
        channels: number of channels C of the map.
        reduction: the hidden layer has C / reduction channels, at least one.

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (2018), equations 2 to 4.

    >>> layer = regard.nn.vision.SqueezeExcitation(8, reduction=2)
    >>> x = torch.randn(2, 8, 5, 7)
    >>> out, gates = layer(x, summary=True)
    >>> torch.equal(out, x * gates.channels[..., None, None])
    True
    >>> torch.allclose(gates.channels, layer.excite(x.mean((2, 3))).sigmoid())
    True
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.excite = _bottleneck("SqueezeExcitation", channels, reduction)

    def forward(self, x: Tensor, *, summary: bool = False) -> Tensor | tuple[Tensor, Gates]:
        """Map x (B, C, H, W) to the same shape; with `summary=True`, return a pair of it and `Gates`."""
        check_map("SqueezeExcitation: x", x, self.channels)
        _check_summary("SqueezeExcitation", summary)
        gate = self.excite(x.mean((2, 3))).sigmoid()
        out = x * gate[..., None, None]
        return (out, Gates(gate)) if summary else out


class CBAM(nn.Module):
    """Multiply each channel by a gate, then each position by a gate.

        x' = x * sigmoid(MLP(mean of x over H, W) + MLP(max of x over H, W))
        out = x' * sigmoid(conv([mean of x' over C; max of x' over C]))

    Both terms share the MLP, which has one hidden layer with a ReLU. There is no batch norm.

    Args:
        channels: number of channels C of the map.
        reduction: the hidden layer has C / reduction channels, at least one.
        kernel_size: size of the convolution, odd.

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module" (2018), equations 1 to 3.

    >>> layer = regard.nn.vision.CBAM(8, reduction=2, kernel_size=3)
    >>> x = torch.randn(2, 8, 5, 7)
    >>> out, gates = layer(x, summary=True)
    >>> gates.channels.shape, gates.places.shape
    (torch.Size([2, 8]), torch.Size([2, 5, 7]))
    >>> torch.allclose(out, x * gates.channels[..., None, None] * gates.places[:, None])
    True
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = _bottleneck("CBAM", channels, reduction)
        if not check.is_int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise check.error("CBAM: kernel_size", kernel_size, "an odd integer > 0", check.is_int(kernel_size))
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, *, summary: bool = False) -> Tensor | tuple[Tensor, Gates]:
        """Map x (B, C, H, W) to the same shape; with `summary=True`, return a pair of it and `Gates`."""
        check_map("CBAM: x", x, self.channels)
        _check_summary("CBAM", summary)
        channels = (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()
        x = x * channels[..., None, None]
        places = self.conv(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid()
        out = x * places
        return (out, Gates(channels, places[:, 0])) if summary else out


def _bottleneck(name: str, channels: int, reduction: int) -> nn.Sequential:
    check.integer(f"{name}: channels", channels, 1)
    check.integer(f"{name}: reduction", reduction, 1)
    hidden = max(channels // reduction, 1)
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def _check_summary(name: str, summary: object) -> None:
    if not isinstance(summary, bool):
        expected = "True or False (a Summary is about attention weights; this layer has gates)"
        raise check.error(f"{name}: summary", summary, expected, False)
