"""Positions: attention alone knows no order.

Three ways to add it: to the input (`sinusoidal`, `Learned`), by turning q and k (`Rotary`, from `rotary.py`), or to the
scores (`ALiBi`, `T5`, or any tensor, given to `attention(bias=...)`). The ones on the scores are computed tile by tile,
and learned ones get their gradient in their own shape.
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
# TensorBias to the scores.


@dataclass(frozen=True)
class Bias:
    """What is added to the scores, after scale and softcap."""

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """The bias of a tile, in the dtype of its scores; it broadcasts to (b, h, l, s)."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError or TypeError where a parameter of the bias does not fit the problem."""

    @classmethod
    def example(cls, heads: int) -> Bias:
        """One of these with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class TensorBias(Bias):
    """A tensor that broadcasts to (B, H, L, S)."""

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
    """-slope_h * |distance of query and key|: attention with linear biases.

    Args:
        slopes: (H,), learned if you like; by default the geometric sequence of the paper.
        align: where the queries stand among the keys, as in `mask.causal`; taken from the mask where left out.

    Source: Press, Smith, Lewis, "Train Short, Test Long" (2022), section 3.
    """

    slopes: Tensor | None = None
    align: Align = None

    def __post_init__(self) -> None:
        check.align(self.align)

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        if self.slopes is None:
            slopes = torch.tensor(alibi_slopes(tile.sizes.H), dtype=dtype, device=tile.device)
        else:
            slopes = self.slopes.to(dtype)
        # Distances as floats of one matrix, not whole numbers of one per head: products of mixed types are slow.
        return -tile.cut_heads(slopes) * tile.behind(self.align).abs().to(dtype)

    def check(self, sizes: Sizes) -> None:
        if self.slopes is not None:
            expected = f"(H,) = ({sizes.H},), or None for those of the paper"
            check.floats("bias: slopes", self.slopes, ((sizes.H,),), expected)

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.rand(heads))


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of the paper: 2^(-8h/H) for a power of two; otherwise those of the next smaller power, filled up with
    every other slope of the next larger one.
    """
    check.whole("alibi_slopes: heads", heads, 0)
    whole = 1 << heads.bit_length() >> 1
    slopes = [2.0 ** (-8.0 * (head + 1) / whole) for head in range(whole)]
    return slopes + [2.0 ** (-8.0 * (2 * head + 1) / (2 * whole)) for head in range(heads - whole)]


@dataclass(frozen=True)
class T5(Bias):
    """A learned number per head and bucket of distances: near distances have a bucket each, far ones share buckets that
    widen logarithmically.

    Args:
        table: (buckets, H), as in Hugging Face's T5 (`relative_attention_bias.weight`).
        bidirectional: half of the buckets for keys after the query; otherwise those share the bucket of distance 0.
        max_distance: everything from here on shares the last bucket.
        align: where the queries stand among the keys, as in `mask.causal`; taken from the mask where left out.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    align: Align = None

    def __post_init__(self) -> None:
        check.align(self.align)

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        bucket = self._bucket(tile.behind(self.align))[0, 0]
        # Widened first, so that the gradient of a bucket is summed in that precision too.
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
        # In float32, and in this order, as in T5's own code and Hugging Face's: where a bucket ends depends on how the
        # logarithm is rounded, and trained tables have learned those ends.
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (buckets - exact)).long()
        return start + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def check(self, sizes: Sizes) -> None:
        if not isinstance(self.bidirectional, bool):
            raise check.wrong("bias: bidirectional", self.bidirectional, "True or False", False)
        least = 4 if self.bidirectional else 2
        even = ", an even number" if self.bidirectional else ""
        fits = check.is_floats(self.table)
        buckets = self.table.shape[0] if fits and self.table.dim() == 2 else 0
        if buckets < least or (even and buckets % 2) or self.table.shape[1] != sizes.H:
            expected = f"floats of shape (buckets, H) with H = {sizes.H}, and at least {least} buckets{even}"
            raise check.wrong("bias: the table of T5", self.table, expected, fits)
        note = f", more than the {buckets // least} distances that have a bucket each"
        check.whole("bias: max_distance", self.max_distance, buckets // least + 1, note)

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.randn(8, heads), max_distance=16)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBias to the input.


def sinusoidal(length: int, width: int, *, base: float = 10000.0, start: int = 0) -> Tensor:
    """Sine and cosine waves of geometrically growing wavelength: add them to the input (B, L, width).

    Returns:
        float32 of shape (length, width): entry 2i is sin(p / base^(2i/width)), entry 2i+1 the cosine, of position
        p = start, start + 1, ...

    Source: Vaswani et al. (2017), section 3.5.
    """
    check.whole("sinusoidal: length", length, 0)
    check.even("sinusoidal: width", width)
    check.positive("sinusoidal: base", base)
    if not check.is_int(start):
        raise check.wrong("sinusoidal: start", start, "an int", False)
    position = torch.arange(start, start + length, dtype=torch.float64)
    angle = position[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class Learned(nn.Module):
    """A learned vector per position, added to the input x (..., L, width).

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning" (2017), section 3.1.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        check.whole("Learned: length", length, 1)
        check.whole("Learned: width", width, 1)
        self.weight = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add the vectors of the positions start, start + 1, ..."""
        length, width = self.weight.shape
        fits = check.is_floats(x)
        if not fits or x.dim() < 2 or x.shape[-1] != width:
            raise check.wrong("Learned: x", x, f"floats of shape (..., L, {width})", fits)
        check.whole("Learned: start", start, 0)
        end = start + x.shape[-2]
        if end > length:
            raise ValueError(f"Learned: x ends at position {end}; expected no more than {length}, the length")
        return x + self.weight[start:end]


# Every bias with a formula by name: tests, benchmarks and documentation loop over this table.
_BIASES: dict[str, type[Bias]] = {"alibi": ALiBi, "t5": T5}

__all__ = ["NTK", "T5", "ALiBi", "Learned", "Linear", "Llama3", "Rotary", "YaRN", "alibi_slopes", "sinusoidal"]
