"""Two-dimensional position embeddings: added to a map, rotations of q and k, or a bias of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard import check
from regard.components.position import Rotary, sinusoidal
from regard.nn.vision.grid import check_map, to_pair


class Sinusoidal2d(nn.Module):
    """Add sinusoidal position embeddings to a map: of the row in the first half of the channels, of the column in the
    second half (`regard.position.sinusoidal`).

    Args:
        base: wavelengths range from 2 pi to 2 pi base.

    >>> x = torch.zeros(1, 8, 3, 4)
    >>> out = regard.nn.vision.Sinusoidal2d()(x)
    >>> torch.equal(out[0, :4, :, 0].T, position.sinusoidal(3, 4))
    True
    >>> torch.equal(out[0, 4:, 0].T, position.sinusoidal(4, 4))
    True

    Source: Carion et al., "End-to-End Object Detection with Transformers" (2020), appendix A.4.
    """

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        check.positive("Sinusoidal2d: base", base)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W), with C a multiple of 4, to the same shape."""
        check_map("Sinusoidal2d: x", x)
        C, H, W = x.shape[1:]
        if C % 4:
            raise ValueError(f"Sinusoidal2d: x has {C} channels; expected a multiple of 4")
        rows, columns = (sinusoidal(side, C // 2, base=self.base).to(x).mT for side in (H, W))
        return x + torch.cat([rows[:, :, None].expand(-1, H, W), columns[:, None].expand(-1, H, W)])


class Learned2d(nn.Module):
    """Add a learned vector per position to a map of at most the given size.

    Args:
        channels: number of channels C of the map.
        size: maximum height and width, a pair or one integer for both.

    >>> layer = regard.nn.vision.Learned2d(8, size=(4, 5))
    >>> out = layer(torch.zeros(2, 8, 3, 4))
    >>> torch.equal(out[1], layer.weight[:, :3, :4])
    True

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equation 1.
    """

    def __init__(self, channels: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        check.integer("Learned2d: channels", channels, 1)
        self.weight = nn.Parameter(torch.randn(channels, *to_pair("Learned2d: size", size, 1)) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        channels, *size = self.weight.shape
        check_map("Learned2d: x", x, channels)
        _check_size("Learned2d", x.shape[2], x.shape[3], size)
        return x + self.weight[:, : x.shape[2], : x.shape[3]]


class Rotary2d(nn.Module):
    """Rotary position embedding in two dimensions: half of the elements are rotated by the row, half by the column, so
    that q . k depends on the relative position.

    Args:
        width: number of elements of each head that are rotated, a multiple of 4. The rest is unchanged.
        base: wavelengths range from 2 pi to 2 pi base.

    >>> rotary = regard.nn.vision.Rotary2d(8)
    >>> q, k = torch.randn(8).expand(12, 8), torch.randn(8).expand(12, 8)  # the same at all positions of 3 x 4
    >>> q, k = rotary(q, k, height=3, width=4)
    >>> scores = (q @ k.T).view(3, 4, 3, 4)
    >>> torch.allclose(scores[0, 0, 1, 2], scores[1, 1, 2, 3], atol=1e-5)  # one row down, two columns to the right
    True

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3 (axial).
    """

    def __init__(self, width: int, *, base: float = 100.0) -> None:
        super().__init__()
        if not check.is_int(width) or width < 4 or width % 4:
            raise check.error("Rotary2d: width", width, "a multiple of 4, > 0", check.is_int(width))
        self.width = width
        self.rotary = Rotary(width // 2, base=base)

    def forward(self, q: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rotate q and k (..., N, D), the tokens of a map of this height and width in row-major order."""
        index = torch.arange(height * width, device=q.device)
        rows, columns, half = index // width, index % width, self.width // 2

        def rotate(x: Tensor) -> Tensor:
            return torch.cat([self.rotary.rotate(x[..., :half], rows), self.rotary.rotate(x[..., half:], columns)], -1)

        return rotate(q), rotate(k)


class RelativeBias2d(nn.Module):
    """Relative position bias: a learned bias per head for each distance of query and key in rows and in columns.

    Calling it with a height and a width returns the bias (heads, N, N) of the N = height * width positions of a map,
    for `attention(bias=...)`.

    Args:
        num_heads: number of heads.
        size: maximum height and width, a pair or one integer for both.

    >>> bias = regard.nn.vision.RelativeBias2d(2, size=4)
    >>> table = bias(3, 4).view(2, 3, 4, 3, 4)
    >>> torch.equal(table[:, 0, 0, 1, 2], table[:, 1, 1, 2, 3]), torch.equal(table[:, 0, 0, 1, 2], table[:, 1, 2, 0, 0])
    (True, False)

    `table` is ((2 height - 1) (2 width - 1), heads), as in Swin's `relative_position_bias_table`.

    Source: Liu et al., "Swin Transformer" (2021), equation 4.
    """

    def __init__(self, num_heads: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        check.integer("RelativeBias2d: num_heads", num_heads, 1)
        self.size = to_pair("RelativeBias2d: size", size, 1)
        height, width = self.size
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the bias (heads, N, N) for a map of this height and width."""
        _check_size("RelativeBias2d", height, width, self.size)
        rows, columns = (torch.arange(side, device=self.table.device) for side in (height, width))
        down = rows[:, None] - rows + self.size[0] - 1
        right = columns[:, None] - columns + self.size[1] - 1
        index = down[:, None, :, None] * (2 * self.size[1] - 1) + right[:, None]
        return self.table[index.reshape(height * width, -1)].permute(2, 0, 1)


def _check_size(name: str, height: int, width: int, maximum: Sequence[int]) -> None:
    if height > maximum[0] or width > maximum[1]:
        raise ValueError(f"{name}: the map is {height}x{width}; expected at most {maximum[0]}x{maximum[1]}, the size")
