"""Rotary positions: q and k are turned by angles that grow with the position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard import check


@dataclass(frozen=True)
class Scaling:
    """How the turning speeds of `Rotary` are changed to reach beyond the length of training."""

    factor: float = 1.0
    magnitude: float = 1.0  # q and k are both multiplied by it

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not check.is_number(self.factor) or not 1 <= self.factor < math.inf:
            raise check.wrong(f"{name}: factor", self.factor, "a finite number >= 1", check.is_number(self.factor))
        check.positive(f"{name}: magnitude", self.magnitude)

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
    RoPE"; Peng et al., "YaRN" (2023), definition 1.
    """

    def apply(self, speed: Tensor, base: float) -> Tensor:
        width = 2 * len(speed)
        if width == 2:
            raise ValueError("NTK: the width of Rotary is 2; expected more: one speed cannot be kept and stretched")
        index = torch.arange(0, width, 2, dtype=speed.dtype) / width
        return torch.pow(base * self.factor ** (width / (width - 2)), -index)


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
            by_default = 0.1 * math.log(self.factor) + 1.0 if check.is_number(self.factor) and self.factor > 1 else 1.0
            object.__setattr__(self, "magnitude", by_default)
        super().__post_init__()
        check.whole("YaRN: length", self.length, 1)
        check.positive("YaRN: slow", self.slow)
        check.positive("YaRN: fast", self.fast)
        if self.fast <= self.slow:
            raise ValueError(f"YaRN: fast is {self.fast} and slow is {self.slow}; expected fast > slow")

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check.whole("Llama3: length", self.length, 1)
        check.positive("Llama3: low", self.low)
        check.positive("Llama3: high", self.high)
        if self.high <= self.low:
            raise ValueError(f"Llama3: high is {self.high} and low is {self.low}; expected high > low")

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

    speed: Tensor  # (width/2,), radians per position

    def __init__(
        self, width: int, *, base: float = 10000.0, scaling: Scaling | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        check.even("Rotary: width", width)
        if not check.is_number(base) or not 1 < base < math.inf:
            raise check.wrong("Rotary: base", base, "a finite number > 1", check.is_number(base))
        if scaling is not None and not isinstance(scaling, Scaling):
            raise check.wrong("Rotary: scaling", scaling, "a position.Linear, NTK, YaRN or Llama3, or None", False)
        scaling = scaling or Scaling()
        self.width, self.interleaved, self.magnitude = width, interleaved, scaling.magnitude
        with torch.device("cpu"):  # so that a model which is laid out on the meta device has its speeds as well
            speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            self.register_buffer("speed", scaling.apply(speed, base), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Speeds follow the module to its device, but stay in float64: an angle is a position times a speed, and in
        bfloat16 the positions from 256 on blur, in float32 those from some 100,000 on. (Apple's GPUs have no float64.)
        """
        speed, self.speed = self.speed, self.speed.float()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.speed.device
        self.speed = speed.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self

    def forward(
        self, q: Tensor, k: Tensor, *, start: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn q (..., L, D) and k (..., S, D). The last query stands beside the last key; the first key at `start`, or
        the keys at `positions`, of shape (S,), or (B, S) for k (B, G, S, D).
        """
        self._check("q", q)
        self._check("k", k)
        L, S = q.shape[-2], k.shape[-2]
        if L > S:
            raise ValueError(f"q has {L} positions but k has {S}; expected no more: call turn() on each instead")
        if not check.is_int(start) or (start and positions is not None):
            raise check.wrong("start", start, "an int, and none where positions are given", check.is_int(start))
        if positions is None:
            positions = torch.arange(start, start + S, device=k.device)
        self._check_positions("k", k, positions)
        return self.turn(q, positions[..., S - L :]), self.turn(k, positions)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (..., N, D) to the given positions, of shape (N,), or (B, N) for x (B, N, D) or (B, H, N, D)."""
        self._check("x", x)
        self._check_positions("x", x, positions)
        angle = positions[..., None].to(self.speed.dtype) * self.speed
        if positions.dim() > 1 and x.dim() > 3:
            angle = angle[..., None, :, :]  # for all heads
        cos, sin = (angle.cos() * self.magnitude).to(x.dtype), (angle.sin() * self.magnitude).to(x.dtype)
        turned, rest = x[..., : self.width], x[..., self.width :]
        axis, pairs = (-1, (self.width // 2, 2)) if self.interleaved else (-2, (2, self.width // 2))
        first, second = turned.reshape(*turned.shape[:-1], *pairs).unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis).flatten(-2)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def _check(self, name: str, x: Tensor) -> None:
        fits = check.is_floats(x)
        if not fits or x.dim() < 2 or x.shape[-1] < self.width:
            raise check.wrong(name, x, f"floats of shape (..., N, D) with D >= {self.width}, the width of Rotary", fits)

    def _check_positions(self, name: str, x: Tensor, positions: Tensor) -> None:
        fits = check.is_ints(positions) or check.is_floats(positions)
        lead, N = tuple(x.shape[: -3 if x.dim() > 3 else -2]), x.shape[-2]
        if not fits or positions.shape[-1:] != (N,) or not check.broadcasts(positions.shape[:-1], lead):
            expected = f"numbers of shape {(N,)}" + (f" or {(*lead, N)}" if lead else "")
            raise check.wrong(f"positions (for {name} of shape {tuple(x.shape)})", positions, expected, fits)
        if positions.device != x.device:
            raise ValueError(f"positions is on {positions.device} but {name} is on {x.device}; expected the same")
