"""Position encodings: attention by itself does not depend on the order of keys.

Positions can be added to the input (`sinusoidal`, `Learned`), rotate q and k (`Rotary`), or be added to the scores as
`attention(bias=...)` (`ALiBi`, `T5`, or any tensor). Biases are computed tile by tile, and never materialized as a
matrix (L, S); the gradient of a parameter has the shape of the parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard import check
from regard.components.rotary import NTK, Linear, Llama3, Rotary, YaRN
from regard.components.tile import Align, Sizes, Tile

# ---------------------------------------------------------------------------------------------------------------------
# Biases of the scores.


@dataclass(frozen=True)
class Bias:
    """Base class of biases, which are added to the scores after scale and softcap."""

    # Whether `check` depends on the lengths L and S: then plans are cached per length.
    depends_on_lengths = False
    # Whether `bias` depends on `tile.behind(align)` and the head only: the distance between query and key. Then the native
    # and Triton kernels take it as a table of distances.
    is_relative = False

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """Return the bias of a tile in the given dtype; it broadcasts to (b, h, l, s)."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError or TypeError if a parameter of the bias does not fit the problem."""

    @classmethod
    def example(cls, heads: int) -> Bias:
        """Return a bias with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class TensorBias(Bias):
    """A tensor that broadcasts to (B, H, L, S)."""

    depends_on_lengths = True

    tensor: Tensor

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        return tile.cut(self.tensor).to(dtype)

    def check(self, sizes: Sizes) -> None:
        full = (sizes.B, sizes.H, sizes.L, sizes.S)
        if not check.broadcasts(self.tensor.shape, full):
            shape = check.shape(self.tensor)
            raise ValueError(f"bias has shape {shape}; expected one that broadcasts to (B, H, L, S) = {full}")


@dataclass(frozen=True)
class ALiBi(Bias):
    """Attention with linear biases: bias_hij = -slope_h * |i - j|, a penalty that grows with the distance.

    It is symmetric: keys after the query get the same penalty as keys before it.

    Args:
        slopes: positive slopes (H,) or (B, H), which may be a parameter; by default the geometric sequence of the paper.
        align: the position of the queries relative to the keys, as in `mask.causal`; by default the one of the mask.

    Source: Press, Smith, Lewis, "Train Short, Test Long" (2022), section 3.

    >>> x = torch.zeros(3, 4)
    >>> bias = position.ALiBi(slopes=torch.tensor([1.0]))  # log ratios of the weights of adjacent keys:
    >>> regard.attention(x, x, x, bias=bias, summary=Summary(full=True))[1].full.log().diff().round(decimals=4)
    tensor([[-1., -1.],
            [ 1., -1.],
            [ 1.,  1.]])
    """

    is_relative = True

    slopes: Tensor | None = None
    align: Align = None

    def __post_init__(self) -> None:
        check.align(self.align)

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        if self.slopes is None:
            slopes = torch.tensor(alibi_slopes(tile.sizes.H), dtype=dtype, device=tile.device)
        else:
            slopes = self.slopes.to(dtype)
        # Convert distances to floats before the product: products of mixed dtypes are slow.
        per_head = tile.cut(slopes[:, :, None, None]) if slopes.dim() == 2 else tile.cut_heads(slopes)
        return -per_head * tile.behind(self.align).abs().to(dtype)

    def check(self, sizes: Sizes) -> None:
        if self.slopes is not None:
            expected = f"(H,) = ({sizes.H},) or (B, H) = {(sizes.B, sizes.H)}, or None for those of the paper"
            check.float_tensor("bias: slopes", self.slopes, ((sizes.H,), (sizes.B, sizes.H)), expected)

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.rand(heads))


def alibi_slopes(heads: int) -> list[float]:
    """Return the H slopes of the paper: 2^(-8h/H) for h = 1, ..., H if H is a power of two. Otherwise those of the next
    smaller power of two, followed by every other slope of the next larger one.

    >>> position.alibi_slopes(4), position.alibi_slopes(3)
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    check.integer("alibi_slopes: heads", heads, 0)
    power = 1 << heads.bit_length() >> 1
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-8.0 * (2 * head + 1) / (2 * power)) for head in range(heads - power)]


@dataclass(frozen=True)
class T5(Bias):
    """A learned bias per head and bucket of distances. Small distances have one bucket each; larger distances share
    buckets of logarithmically increasing width.

    Args:
        table: (buckets, H), as `relative_attention_bias.weight` in T5 of Hugging Face Transformers.
        bidirectional: if True, half of the buckets are for keys after the query; otherwise these share the bucket of
            distance 0.
        max_distance: distances from here on share the last bucket.
        align: the position of the queries relative to the keys, as in `mask.causal`; by default the one of the mask.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1.

    >>> x, table = torch.zeros(4, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> _, stats = regard.attention(x, x, x, bias=position.T5(table, max_distance=8), summary=Summary(full=True))
    >>> (stats.full / stats.full.diagonal()[:, None]).log().round()  # keys after the query use the second half
    tensor([[0., 3., 3., 3.],
            [1., 0., 3., 3.],
            [1., 1., 0., 3.],
            [1., 1., 1., 0.]])
    """

    is_relative = True

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    align: Align = None

    def __post_init__(self) -> None:
        check.align(self.align)

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        bucket = self._bucket(tile.behind(self.align))[0, 0]
        # Convert the table first, so that the gradient of a bucket is summed in this precision too.
        return self.table[:, slice(*tile.h)].to(dtype).T[None, :, bucket]

    def _bucket(self, behind: Tensor) -> Tensor:
        buckets = self.table.shape[0]
        start: Tensor | int = 0
        if self.bidirectional:
            buckets //= 2
            start = (behind < 0) * buckets
            distance = behind.abs()
        else:
            distance = behind.clamp(min=0)
        exact = buckets // 2
        # In float32 and in this order, as in the code of T5 and Hugging Face: rounding of the logarithm decides where a
        # bucket ends, and trained tables depend on it.
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (buckets - exact)).long()
        return start + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def check(self, sizes: Sizes) -> None:
        if not isinstance(self.bidirectional, bool):
            raise check.error("bias: bidirectional", self.bidirectional, "True or False", False)
        least = 4 if self.bidirectional else 2
        even = ", an even number" if self.bidirectional else ""
        fits = check.is_float_tensor(self.table)
        buckets = self.table.shape[0] if fits and self.table.dim() == 2 else 0
        if buckets < least or (even and buckets % 2) or self.table.shape[1] != sizes.H:
            expected = f"a float tensor of shape (buckets, H) with H = {sizes.H}, and at least {least} buckets{even}"
            raise check.error("bias: the table of T5", self.table, expected, fits)
        note = f", more than the {buckets // least} distances that have one bucket each"
        check.integer("bias: max_distance", self.max_distance, buckets // least + 1, note)

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.randn(8, heads), max_distance=16)


# ---------------------------------------------------------------------------------------------------------------------
# Encodings of the input.


def sinusoidal(length: int, width: int, *, base: float = 10000.0, start: int = 0) -> Tensor:
    """Return sine and cosine waves of geometrically increasing wavelength, to be added to the input (B, L, width).

    Returns:
        float32 tensor (length, width). For position p = start, start + 1, ..., element 2i is sin(p / base^(2i/width)),
        and element 2i+1 its cosine.

    Source: Vaswani et al. (2017), section 3.5.

    >>> position.sinusoidal(2, 4, base=100.0, start=1)  # sin 1, cos 1, sin 0.1, cos 0.1; then those of 2 and 0.2
    tensor([[ 0.8415,  0.5403,  0.0998,  0.9950],
            [ 0.9093, -0.4161,  0.1987,  0.9801]])
    """
    check.integer("sinusoidal: length", length, 0)
    check.even_integer("sinusoidal: width", width)
    check.positive("sinusoidal: base", base)
    if not check.is_int(start):
        raise check.error("sinusoidal: start", start, "an integer", False)
    position = torch.arange(start, start + length, dtype=torch.float64)
    angle = position[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class Learned(nn.Module):
    """A learned vector per position, added to the input.

    Args:
        length: number of positions. width: width of the input.

    Shape: x (..., L, width) -> (..., L, width), L <= length.

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning" (2017), section 3.1.

    >>> layer = position.Learned(length=10, width=4)
    >>> torch.equal(layer(torch.zeros(2, 3, 4), start=5)[1], layer.weight[5:8])
    True
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        check.integer("Learned: length", length, 1)
        check.integer("Learned: width", width, 1)
        self.weight = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add the vectors of positions start, start + 1, ... to x (..., L, width)."""
        length, width = self.weight.shape
        fits = check.is_float_tensor(x)
        if not fits or x.dim() < 2 or x.shape[-1] != width:
            raise check.error("Learned: x", x, f"a float tensor of shape (..., L, {width})", fits)
        check.integer("Learned: start", start, 0)
        end = start + x.shape[-2]
        if end > length:
            raise ValueError(f"Learned: x ends at position {end}; expected no more than {length}, the length")
        return x + self.weight[start:end]


# All biases with a formula by name. Tests, benchmarks and the documentation iterate over this table.
_BIASES: dict[str, type[Bias]] = {"alibi": ALiBi, "t5": T5}

__all__ = ["NTK", "T5", "ALiBi", "Learned", "Linear", "Llama3", "Rotary", "YaRN", "alibi_slopes", "sinusoidal"]
