"""Gates: channels, and places, multiplied by a number between 0 and 1 that the map itself decides.

They are called attention, but nothing looks at anything else: there are neither queries nor keys, and no softmax. So they do
not go through `regard.attention`, and what they tell is the gates themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard import check
from regard.nn.vision.grid import check_map


class Gates(NamedTuple):
    """What a layer multiplied by: `channels` (B, C), and `places` (B, H, W), None where it has no such gate. Each number is
    between 0 and 1 on its own; they need not sum to 1.
    """

    channels: Tensor
    places: Tensor | None = None


class SqueezeExcitation(nn.Module):
    """Each channel times a gate that depends on the means of all channels.

        z = mean of x over H, W
        out = x * sigmoid(W_2 relu(W_1 z + b_1) + b_2)

    Args:
        channels: C, those of the map.
        reduction: the layer between has C / reduction channels, at least one.

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (2018), equations 2 to 4.

    >>> nn.Sequential(nn.Conv2d(3, 64, 3), SqueezeExcitation(64), nn.ReLU())
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.excite = _bottleneck("SqueezeExcitation", channels, reduction)

    def forward(self, x: Tensor, *, summary: bool = False) -> Tensor | tuple[Tensor, Gates]:
        """From x (B, C, H, W) to the same shape; with `summary=True`, a pair of it and `Gates`."""
        check_map("SqueezeExcitation: x", x, self.channels)
        _check_summary("SqueezeExcitation", summary)
        gate = self.excite(x.mean((2, 3))).sigmoid()
        out = x * gate[..., None, None]
        return (out, Gates(gate)) if summary else out


class CBAM(nn.Module):
    """Each channel times a gate, then each place times a gate.

        x' = x * sigmoid(MLP(mean of x over H, W) + MLP(max of x over H, W))
        out = x' * sigmoid(conv([mean of x' over C; max of x' over C]))

    The MLP, which both share, has one hidden layer with a ReLU. There is no batch norm.

    Args:
        channels: C, those of the map.
        reduction: the hidden layer has C / reduction channels, at least one.
        kernel_size: of the convolution, odd.

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module" (2018), equations 1 to 3.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = _bottleneck("CBAM", channels, reduction)
        if not check.is_int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise check.wrong("CBAM: kernel_size", kernel_size, "an odd int > 0", check.is_int(kernel_size))
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, *, summary: bool = False) -> Tensor | tuple[Tensor, Gates]:
        """From x (B, C, H, W) to the same shape; with `summary=True`, a pair of it and `Gates`."""
        check_map("CBAM: x", x, self.channels)
        _check_summary("CBAM", summary)
        channels = (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()
        x = x * channels[..., None, None]
        places = self.conv(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid()
        out = x * places
        return (out, Gates(channels, places[:, 0])) if summary else out


def _bottleneck(name: str, channels: int, reduction: int) -> nn.Sequential:
    check.whole(f"{name}: channels", channels, 1)
    check.whole(f"{name}: reduction", reduction, 1)
    hidden = max(channels // reduction, 1)
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def _check_summary(name: str, summary: object) -> None:
    if not isinstance(summary, bool):
        expected = "True or False (gates are no weights of keys, which a Summary asks for)"
        raise check.wrong(f"{name}: summary", summary, expected, False)
