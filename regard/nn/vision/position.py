"""Positions in two dimensions, for the places of a map: added to it, by turning q and k, or as a bias of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard import check
from regard.components.position import Rotary, sinusoidal
from regard.nn.vision.grid import check_map, pair


class Sinusoidal2d(nn.Module):
    """Waves, added to a map of any size: the first half of the channels has those of the row, the second those of the
    column (`regard.position.sinusoidal`).

    Args:
        base: wavelengths grow from 2 pi to 2 pi base.

    Source: Carion et al., "End-to-End Object Detection with Transformers" (2020), appendix A.4.
    """

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        check.positive("Sinusoidal2d: base", base)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to the same shape; C is a multiple of 4."""
        check_map("Sinusoidal2d: x", x)
        C, H, W = x.shape[1:]
        if C % 4:
            raise ValueError(f"Sinusoidal2d: x has {C} channels; expected a multiple of 4")
        rows, columns = (sinusoidal(side, C // 2, base=self.base).to(x).mT for side in (H, W))
        return x + torch.cat([rows[:, :, None].expand(-1, H, W), columns[:, None].expand(-1, H, W)])


class Learned2d(nn.Module):
    """A learned vector per place, added to a map of this size or a smaller one.

    Args:
        channels: C, those of the map.
        size: its height and width, a pair, or one number for both.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equation 1.
    """

    def __init__(self, channels: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        check.whole("Learned2d: channels", channels, 1)
        self.weight = nn.Parameter(torch.randn(channels, *pair("Learned2d: size", size, 1)) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, C, H, W) to the same shape."""
        channels, *size = self.weight.shape
        check_map("Learned2d: x", x, channels)
        _check_size("Learned2d", x.shape[2], x.shape[3], size)
        return x + self.weight[:, : x.shape[2], : x.shape[3]]


class Rotary2d(nn.Module):
    """q and k turned by angles that grow with the position: a half of the entries with the row, the other with the column.
    q.k then depends on how far apart two places are, in rows and in columns.

    Args:
        width: how many entries of each head are turned, a multiple of 4; the rest stays.
        base: the wavelengths grow from 2 pi to 2 pi base.

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3 (axial).
    """

    def __init__(self, width: int, *, base: float = 100.0) -> None:
        super().__init__()
        if not check.is_int(width) or width < 4 or width % 4:
            raise check.wrong("Rotary2d: width", width, "a multiple of 4, > 0", check.is_int(width))
        self.width = width
        self.rotary = Rotary(width // 2, base=base)

    def forward(self, q: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Turn q and k (..., N, D), the tokens of a map of this height and width row by row."""
        place = torch.arange(height * width, device=q.device)
        rows, columns, half = place // width, place % width, self.width // 2

        def turn(x: Tensor) -> Tensor:
            return torch.cat([self.rotary.turn(x[..., :half], rows), self.rotary.turn(x[..., half:], columns)], -1)

        return turn(q), turn(k)


class RelativeBias2d(nn.Module):
    """A learned number per head for how far apart query and key are, in rows and in columns. Called with a height and a
    width, it gives the bias (heads, N, N) of the N = height * width places of a map, for `attention(bias=...)`.

    Args:
        num_heads: how many heads.
        size: the largest height and width, a pair, or one number for both.

    `table` is ((2 height - 1) (2 width - 1), heads), as in Swin's `relative_position_bias_table`.

    Source: Liu et al., "Swin Transformer" (2021), equation 4.
    """

    def __init__(self, num_heads: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        check.whole("RelativeBias2d: num_heads", num_heads, 1)
        self.size = pair("RelativeBias2d: size", size, 1)
        height, width = self.size
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """The bias (heads, N, N)."""
        _check_size("RelativeBias2d", height, width, self.size)
        rows, columns = (torch.arange(side, device=self.table.device) for side in (height, width))
        down = rows[:, None] - rows + self.size[0] - 1
        right = columns[:, None] - columns + self.size[1] - 1
        index = down[:, None, :, None] * (2 * self.size[1] - 1) + right[:, None]
        return self.table[index.reshape(height * width, -1)].permute(2, 0, 1)


def _check_size(name: str, height: int, width: int, most: Sequence[int]) -> None:
    if height > most[0] or width > most[1]:
        raise ValueError(f"{name}: the map is {height}x{width}; expected no more than {most[0]}x{most[1]}, the size")
