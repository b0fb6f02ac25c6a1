"""Rotary position embeddings (RoPE): rotate q and k by angles proportional to the position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard import check
from regard.deprecated import method


@dataclass(frozen=True)
class Scaling:
    """Base class of methods that change the speeds of `Rotary` to extend the context beyond the training length."""

    factor: float = 1.0
    magnitude: float = 1.0  # factor of both q and k

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not check.is_number(self.factor) or not 1 <= self.factor < math.inf:
            raise check.error(f"{name}: factor", self.factor, "a finite number >= 1", check.is_number(self.factor))
        check.positive(f"{name}: magnitude", self.magnitude)

    def apply(self, speed: Tensor, base: float) -> Tensor:
        """Return new speeds (width/2,) in radians per position from the original ones."""
        return speed


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: positions are divided by `factor`.

    Source: Chen et al., "Positional Interpolation" (2023), equation 4.

    >>> plain, scaled = position.Rotary(8), position.Rotary(8, scaling=position.Linear(4.0))
    >>> plain.speed / scaled.speed
    tensor([4., 4., 4., 4.], dtype=torch.float64)
    """

    def apply(self, speed: Tensor, base: float) -> Tensor:
        return speed / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """A larger base: the slowest speed is divided by `factor`, and the fastest one stays.

    Source: bloc97 (2023), "NTK-aware scaled RoPE"; Peng et al., "YaRN" (2023), definition 1.

    >>> plain, scaled = position.Rotary(8), position.Rotary(8, scaling=position.NTK(8.0))
    >>> (plain.speed / scaled.speed).round(decimals=4)
    tensor([1., 2., 4., 8.], dtype=torch.float64)
    """

    def apply(self, speed: Tensor, base: float) -> Tensor:
        width = 2 * len(speed)
        if width == 2:
            raise ValueError(
                "NTK: the width of Rotary is 2; expected at least 4, as a single speed cannot both stay and be scaled"
            )
        index = torch.arange(0, width, 2, dtype=speed.dtype) / width
        return torch.pow(base * self.factor ** (width / (width - 2)), -index)


@dataclass(frozen=True)
class YaRN(Scaling):
    """Fast speeds stay and slow ones are divided by `factor`, with a ramp between; q and k are scaled by `magnitude`.

    Args:
        factor: ratio of the extended to the training length.
        magnitude: factor of q and k; by default sqrt(1/t) = 0.1 ln(factor) + 1.
        length: training length in tokens.
        fast, slow: numbers of rotations over the training length above which a speed stays, and below which it is
            divided by `factor`.

    Source: Peng et al., "YaRN" (2023), equations 19-22.

    >>> plain, scaled = position.Rotary(8), position.Rotary(8, scaling=position.YaRN(4.0))
    >>> plain.speed / scaled.speed
    tensor([1.0000, 1.0000, 1.6000, 4.0000], dtype=torch.float64)
    >>> round(scaled.magnitude, 4)
    1.1386
    """

    magnitude: float = 0.0
    length: int = 4096
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        if self.magnitude == 0.0:
            default = 0.1 * math.log(self.factor) + 1.0 if check.is_number(self.factor) and self.factor > 1 else 1.0
            object.__setattr__(self, "magnitude", default)
        super().__post_init__()
        check.integer("YaRN: length", self.length, 1)
        check.positive("YaRN: slow", self.slow)
        check.positive("YaRN: fast", self.fast)
        if self.fast <= self.slow:
            raise ValueError(f"YaRN: fast is {self.fast} and slow is {self.slow}; expected fast > slow")

    def apply(self, speed: Tensor, base: float) -> Tensor:
        width = 2 * len(speed)

        def index(turns: float) -> float:
            return width * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(index(self.fast)), 0), min(math.ceil(index(self.slow)), width - 1)
        ramp = ((torch.arange(len(speed), dtype=speed.dtype) - low) / max(high - low, 0.001)).clamp(0, 1)
        return speed / self.factor * ramp + speed * (1 - ramp)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Wavelengths below length/high stay, those above length/low are multiplied by `factor`, with a ramp between.

    Args:
        factor: ratio of the extended to the training length.
        length: training length in tokens.
        low, high: numbers of rotations over the training length.

    Source: Dubey et al., "The Llama 3 Herd of Models" (2024), and the reference code of Llama 3.1.

    >>> plain, scaled = position.Rotary(8), position.Rotary(8, scaling=position.Llama3(8.0))
    >>> plain.speed / scaled.speed
    tensor([1.0000, 1.0000, 1.0000, 4.6815], dtype=torch.float64)
    """

    length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.integer("Llama3: length", self.length, 1)
        check.positive("Llama3: low", self.low)
        check.positive("Llama3: high", self.high)
        if self.high <= self.low:
            raise ValueError(f"Llama3: high is {self.high} and low is {self.low}; expected high > low")

    def apply(self, speed: Tensor, base: float) -> Tensor:
        turns = self.length * speed / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return speed / self.factor * (1 - keep) + speed * keep


class Rotary(nn.Module):
    """Rotary position embedding (RoPE): `q, k = rotary(q, k)` rotates pairs of elements by an angle proportional to the
    position, so that q.k depends on the distance only.

    Args:
        width: number of elements of each head that are rotated, even; the others do not change (partial RoPE).
        base: wavelengths range from 2 pi to 2 pi base.
        scaling: `Linear`, `NTK`, `YaRN` or `Llama3`, to extend the context beyond the training length.
        interleaved: if True, pairs are (2i, 2i+1), as in the paper and GPT-J. By default they are (i, i + width/2), as
            in GPT-NeoX, Llama and Hugging Face Transformers.

    Shape: q (..., L, D), k (..., S, D) with D >= width -> the same shapes.

    Source: Su et al., "RoFormer" (2021), equation 34.

    >>> rotary, q, k = position.Rotary(8), torch.randn(1, 8), torch.randn(1, 8)
    >>> at = [rotary.rotate(q, torch.tensor([i + 3])) @ rotary.rotate(k, torch.tensor([i])).T for i in (0, 1000)]
    >>> torch.allclose(at[0], at[1], atol=1e-5)  # the same distance, 3
    True
    """

    speed: Tensor  # (width/2,), radians per position

    def __init__(
        self, width: int, *, base: float = 10000.0, scaling: Scaling | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        check.even_integer("Rotary: width", width)
        if not check.is_number(base) or not 1 < base < math.inf:
            raise check.error("Rotary: base", base, "a finite number > 1", check.is_number(base))
        if scaling is not None and not isinstance(scaling, Scaling):
            raise check.error("Rotary: scaling", scaling, "a position.Linear, NTK, YaRN or Llama3, or None", False)
        scaling = scaling or Scaling()
        self.width, self.interleaved, self.magnitude = width, interleaved, scaling.magnitude
        with torch.device("cpu"):  # a model created on the meta device needs its speeds too
            speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            self.register_buffer("speed", scaling.apply(speed, base), persistent=False)
        self._initial = self.speed  # for a module that comes back from the meta device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move the speeds with the module, but keep them in float64 (float32 on MPS, which has no float64).

        An angle is a position times a speed: bfloat16 is inexact for positions above 256, float32 above about 100,000.
        """
        speed, self.speed = self._initial if self.speed.is_meta else self.speed, self.speed.float()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.speed.device
        self.speed = speed.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self

    def forward(
        self, q: Tensor, k: Tensor, *, start: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate q (..., L, D) and k (..., S, D). The last query has the position of the last key.

        Args:
            start: position of the first key.
            positions: positions of the keys, of shape (S,), or (B, S) for k (B, G, S, D); instead of `start`.
        """
        self._check("q", q)
        self._check("k", k)
        L, S = q.shape[-2], k.shape[-2]
        if L > S:
            raise ValueError(f"q has {L} positions but k has {S}; expected no more: call rotate() on each instead")
        if not check.is_int(start) or (start and positions is not None):
            raise check.error("start", start, "an integer, and not together with positions", check.is_int(start))
        if positions is None:
            positions = torch.arange(start, start + S, device=k.device)
        self._check_positions("k", k, positions)
        return self.rotate(q, positions[..., S - L :]), self.rotate(k, positions)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (..., N, D) by its positions, of shape (N,), or (B, N) for x (B, N, D) or (B, H, N, D)."""
        self._check("x", x)
        self._check_positions("x", x, positions)
        angle = positions[..., None].to(self.speed.dtype) * self.speed
        if positions.dim() > 1 and x.dim() > 3:
            angle = angle[..., None, :, :]  # broadcast over heads
        cos, sin = (angle.cos() * self.magnitude).to(x.dtype), (angle.sin() * self.magnitude).to(x.dtype)
        rotated, rest = x[..., : self.width], x[..., self.width :]
        axis, pairs = (-1, (self.width // 2, 2)) if self.interleaved else (-2, (2, self.width // 2))
        first, second = rotated.reshape(*rotated.shape[:-1], *pairs).unbind(axis)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], axis).flatten(-2)
        return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated

    turn = method("regard.components.rotary.Rotary", "turn")

    def _check(self, name: str, x: Tensor) -> None:
        fits = check.is_float_tensor(x)
        if not fits or x.dim() < 2 or x.shape[-1] < self.width:
            raise check.error(
                name, x, f"a float tensor of shape (..., N, D) with D >= {self.width}, the width of Rotary", fits
            )

    def _check_positions(self, name: str, x: Tensor, positions: Tensor) -> None:
        fits = check.is_integer_tensor(positions) or check.is_float_tensor(positions)
        lead, N = tuple(x.shape[: -3 if x.dim() > 3 else -2]), x.shape[-2]
        if not fits or positions.shape[-1:] != (N,) or not check.broadcasts(positions.shape[:-1], lead):
            expected = f"numbers of shape {(N,)}" + (f" or {(*lead, N)}" if lead else "")
            raise check.error(f"positions (for {name} of shape {tuple(x.shape)})", positions, expected, fits)
        if positions.device != x.device:
            raise ValueError(f"positions is on {positions.device} but {name} is on {x.device}; expected the same")
