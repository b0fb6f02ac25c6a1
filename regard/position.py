"""Positions: attention alone knows no order.

Three ways to add it: to the input (`sinusoidal`, `Learned`), by turning q and k (`Rotary`), or to the scores (`ALiBi`,
`T5`, or any tensor, given to `attention(bias=...)`). The ones on the scores are computed tile by tile, and learned ones
get their gradient in their own shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.mask import Align, checked_align
from regard.score import check_per_head
from regard.tile import Sizes, Tile

# ---------------------------------------------------------------------------------------------------------------------
# Added to the scores.


@dataclass(frozen=True)
class Bias:
    """What is added to the scores, after scale and softcap."""

    def bias(self, tile: Tile) -> Tensor:
        """The bias of a tile, broadcast to (b, h, l, s)."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError where a tensor of the bias does not fit the problem."""

    @classmethod
    def example(cls, heads: int) -> Bias:
        """One of these with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class Added(Bias):
    """A tensor that broadcasts to (B, H, L, S)."""

    tensor: Tensor

    def bias(self, tile: Tile) -> Tensor:
        return tile.cut(self.tensor)

    def check(self, sizes: Sizes) -> None:
        shape, full = tuple(self.tensor.shape), (sizes.B, sizes.H, sizes.L, sizes.S)
        if any(got not in (1, expected) for got, expected in zip(shape, full, strict=True)):
            raise ValueError(f"bias: has shape {shape}; expected one that broadcasts to (B, H, L, S) = {full}")


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
        checked_align(self.align)

    def bias(self, tile: Tile) -> Tensor:
        if self.slopes is None:
            slopes = torch.tensor(alibi_slopes(tile.sizes.H)[slice(*tile.h)], device=tile.device).view(1, -1, 1, 1)
        else:
            slopes = tile.cut_heads(self.slopes)
        return -slopes * tile.behind(self.align).abs()

    def check(self, sizes: Sizes) -> None:
        if self.slopes is not None and self.slopes.shape != (sizes.H,):
            raise ValueError(f"bias: slopes has shape {tuple(self.slopes.shape)}; expected (H,) = ({sizes.H},)")

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.rand(heads))


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of the paper: 2^(-8h/H) for a power of two; otherwise those of the next smaller power, filled up with
    every other slope of the next larger one."""
    whole = 1 << (heads.bit_length() - 1)
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
        checked_align(self.align)

    def bias(self, tile: Tile) -> Tensor:
        bucket = self._bucket(tile.behind(self.align))[0, 0]
        return self.table[:, slice(*tile.h)].T[None, :, bucket]

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
        scale = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return start + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def check(self, sizes: Sizes) -> None:
        least = 4 if self.bidirectional else 2
        if self.table.dim() != 2 or self.table.shape[1] != sizes.H or self.table.shape[0] < least:
            raise ValueError(
                f"bias: the T5 table has shape {tuple(self.table.shape)}; expected (buckets, H) with at least {least} "
                f"buckets and H = {sizes.H}"
            )
        if self.max_distance <= self.table.shape[0] // least:
            raise ValueError(
                f"bias: max_distance is {self.max_distance}; expected more than the "
                f"{self.table.shape[0] // least} distances that have a bucket each"
            )

    @classmethod
    def example(cls, heads: int) -> Bias:
        return cls(torch.randn(8, heads), max_distance=16)


# ---------------------------------------------------------------------------------------------------------------------
# Added to the input.


def sinusoidal(length: int, width: int, *, base: float = 10000.0, start: int = 0) -> Tensor:
    """Sine and cosine waves of geometrically growing wavelength: add them to the input (B, L, width).

    Returns:
        float32 of shape (length, width): entry 2i is sin(p / base^(2i/width)), entry 2i+1 the cosine, of position
        p = start, start + 1, ...

    Source: Vaswani et al. (2017), section 3.5.
    """
    if width % 2 or width <= 0 or length < 0:
        raise ValueError(f"sinusoidal: length {length}, width {width}; expected length >= 0 and an even width > 0")
    position = torch.arange(start, start + length, dtype=torch.float64)
    angle = position[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class Learned(nn.Module):
    """A learned vector per position, added to the input x (..., L, width).

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning" (2017), section 3.1.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x plus the vectors of the positions start, start + 1, ..."""
        end = start + x.shape[-2]
        if start < 0 or end > self.weight.shape[0] or x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"x: has shape {tuple(x.shape)} and starts at {start}; expected (..., L, {self.weight.shape[1]}) with "
                f"start + L <= {self.weight.shape[0]}"
            )
        return x + self.weight[start:end]


# ---------------------------------------------------------------------------------------------------------------------
# Turning q and k.


@dataclass(frozen=True)
class Scaling:
    """How the turning speeds of `Rotary` are changed to reach beyond the length of training."""

    factor: float = 1.0
    magnitude: float = 1.0  # q and k are both multiplied by it

    def apply(self, speed: Tensor, base: float) -> Tensor:
        """New speeds (width/2,) in radians per position, from the plain ones."""
        return speed


@dataclass(frozen=True)
class Linear(Scaling):
    """Positions divided by `factor`. Source: Chen et al., "Positional Interpolation" (2023), equation 4."""

    def apply(self, speed: Tensor, base: float) -> Tensor:
        return speed / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """A larger base: slow turns are stretched by `factor`, fast ones kept. Source: bloc97 (2023), "NTK-aware scaled
    RoPE"; Peng et al., "YaRN" (2023), definition 1."""

    def apply(self, speed: Tensor, base: float) -> Tensor:
        width = 2 * len(speed)
        index = torch.arange(0, width, 2, dtype=speed.dtype) / width
        return (base * self.factor ** (width / (width - 2))) ** -index


@dataclass(frozen=True)
class YaRN(Scaling):
    """Fast turns kept, slow ones stretched by `factor`, a ramp between, and sharper weights.

    Args:
        factor: how much longer than in training. length: the length of training, in tokens.
        fast, slow: turns over that length from which a speed is kept, and below which it is stretched.
        magnitude: by default sqrt(1/t) = 0.1 ln(factor) + 1.

    Source: Peng et al., "YaRN" (2023), equations 19-22.
    """

    magnitude: float = 0.0
    length: int = 4096
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        if self.magnitude == 0.0:
            object.__setattr__(self, "magnitude", 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)

    def apply(self, speed: Tensor, base: float) -> Tensor:
        width = 2 * len(speed)

        def place(turns: float) -> float:
            return width * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(place(self.fast)), 0), min(math.ceil(place(self.slow)), width - 1)
        ramp = ((torch.arange(len(speed), dtype=speed.dtype) - low) / max(high - low, 0.001)).clamp(0, 1)
        return speed / self.factor * ramp + speed * (1 - ramp)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Wavelengths up to length/high kept, from length/low on stretched by `factor`, a ramp between.

    Source: Dubey et al., "The Llama 3 Herd of Models" (2024), and the reference code of Llama 3.1.
    """

    length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def apply(self, speed: Tensor, base: float) -> Tensor:
        turns = self.length * speed / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return speed / self.factor * (1 - kept) + speed * kept


class Rotary(nn.Module):
    """Rotary positions: `q, k = rotary(q, k)` turns pairs of entries by an angle that grows with the position, so that
    q.k depends on the distance alone.

    Args:
        width: how many entries of each head are turned, even; the rest stays (partial rotary).
        base: the wavelengths grow from 2 pi to 2 pi base.
        scaling: `Linear`, `NTK`, `YaRN` or `Llama3`, to reach beyond the length of training.
        interleaved: pairs are neighbours (2i, 2i+1), as in the paper and GPT-J; by default (i, i + width/2), as in
            GPT-NeoX, Llama and Hugging Face.

    Source: Su et al., "RoFormer" (2021), equation 34.
    """

    speed: Tensor

    def __init__(
        self, width: int, *, base: float = 10000.0, scaling: Scaling | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        if width <= 0 or width % 2:
            raise ValueError(f"Rotary: width is {width}; expected an even number > 0")
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(f"Rotary: scaling is {type(scaling).__name__}; expected Linear, NTK, YaRN or Llama3")
        speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        scaling = scaling or Scaling()
        self.width, self.interleaved, self.magnitude = width, interleaved, scaling.magnitude
        self.register_buffer("speed", scaling.apply(speed, base).float(), persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, *, start: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn q (..., L, D) and k (..., S, D). The last query stands beside the last key; the first key at `start`, or
        the keys at `positions`, of shape (S,) or (B, S)."""
        L, S = q.shape[-2], k.shape[-2]
        if L > S:
            raise ValueError(f"q: has {L} positions, k has {S}; expected no more queries than keys: give turn() each apart")
        if positions is None:
            positions = torch.arange(start, start + S, device=k.device)
        return self.turn(q, positions[..., S - L :]), self.turn(k, positions)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (..., N, D) to the given positions, of shape (N,), or (B, N) for x (B, H, N, D)."""
        if x.shape[-1] < self.width or positions.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"x: has shape {tuple(x.shape)} and positions {tuple(positions.shape)}; expected (..., N, D) with "
                f"D >= {self.width}, and (N,) or (B, N)"
            )
        angle = positions[..., None].float() * self.speed
        angle = angle if angle.dim() == 2 else angle[:, None]
        cos, sin = (angle.cos() * self.magnitude).to(x.dtype), (angle.sin() * self.magnitude).to(x.dtype)
        turned, rest = x[..., : self.width], x[..., self.width :]
        axis = -1 if self.interleaved else -2
        first, second = turned.unflatten(-1, (-1, 2) if self.interleaved else (2, -1)).unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis).flatten(-2)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


# Every bias with a formula by name: tests, benchmarks and documentation loop over this table.
_BIASES: dict[str, type[Bias]] = {"alibi": ALiBi, "t5": T5}

__all__ = ["ALiBi", "Learned", "Linear", "Llama3", "NTK", "Rotary", "T5", "YaRN", "alibi_slopes", "sinusoidal"]
