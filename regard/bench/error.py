"""Whether a result is right: its error against float64, and the budget that rounding allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.kernels.choose import chosen

# How often a result may be rounded beside the budget, in units of its last place at the size of the largest.
_ROUNDINGS = 4.0
# In so many numbers, the largest rounding error is no matter of luck; of fewer, the plain way may err by little by luck.
_MANY = 256
# Inputs are drawn so often, and the worst counts.
_DRAWS = 2


@dataclass(frozen=True)
class Error:
    """The worst result of all outputs and gradients.

    Args:
        relative: its largest error, relative to its largest number.
        share: of the budget; above 1, or NaN, the result is wrong.
        kernel: the one that was looked at.
    """

    relative: float
    share: float
    kernel: str

    @property
    def within(self) -> bool:
        return self.share <= 1.0


def error(function: Callable[..., Sequence[Tensor]], inputs: Callable[[], Sequence[Tensor]], backward: bool) -> Error:
    """Measure a function of some inputs, which takes the name of a `kernel` beside them.

    The truth is the materialised equation in float64; the budget, twice the error of the same in float32, which all
    kernels keep their sums in, and a few roundings to the type of the result.
    """
    worst = Error(0.0, 0.0, "")
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        drawn = list(inputs())
        with chosen() as ran:
            found, given = _outcome(function, drawn, None, backward)
        truth, _ = _outcome(function, [x.double() for x in drawn], "reference", backward, given)
        straight, _ = _outcome(function, [x.float() for x in drawn], "reference", backward, given)
        for x, y, plain in zip(found, truth, straight, strict=True):
            relative, share = _compare(x, y, plain)
            if not share <= worst.share:
                worst = Error(relative, share, "")
    return Error(worst.relative, worst.share, ran[0])


def _compare(found: Tensor, truth: Tensor, straight: Tensor) -> tuple[float, float]:
    """The error relative to the largest number, and relative to the budget."""
    scale = float(truth.abs().max())
    off, plain = (float((x.double() - truth).abs().max()) for x in (found, straight))
    budget = (2 if truth.numel() >= _MANY else 4) * plain + _ROUNDINGS * torch.finfo(found.dtype).eps * scale
    if math.isnan(off):
        return math.nan, math.inf
    return off / scale if scale else off, off / budget if budget else math.inf if off else 0.0


def _outcome(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    kernel: str | None,
    backward: bool,
    given: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The outputs, with backward the gradients too, and from which gradients of the outputs those come."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    outputs = list(function(*leaves, kernel=kernel))
    if not backward:
        return outputs, ()
    given = [torch.randn_like(x) for x in outputs] if given is None else given
    gradients = torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g, x in zip(given, outputs, strict=True)])
    return [*[x.detach() for x in outputs], *gradients], given
