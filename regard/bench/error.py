"""Whether a result is right: its error against float64, and the budget that rounding allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.choose import record_backends

# How often a result may be rounded beside the budget, in units of its last place at the size of the largest.
_ROUNDINGS = 4.0
# In so many numbers, the largest rounding error is no matter of luck; of fewer, the plain way may err by little by luck.
_MANY = 256
# Inputs are drawn so often, and the worst counts.
_DRAWS = 2
# So often is the plain way measured again where a result is over budget: it may have been right by luck.
_AGAIN = 16


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
    kernels keep their sums in, and a few roundings to the type of the result. The largest error is often that of a single
    number, which the plain way may have right by luck: where a result is over budget, that way is measured again, on inputs
    that are off by up to half a unit of the last place.
    """
    worst = Error(0.0, 0.0, "")
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        drawn = list(inputs())
        with record_backends() as ran:
            found, given = _outcome(function, drawn, None, backward)
        truth = _equation(function, [x.double() for x in drawn], backward, given)
        plain = _plain(function, drawn, truth, backward, given)
        if any(not _compare(*each)[1] <= 1.0 for each in zip(found, truth, plain, strict=True)):
            blur = torch.Generator().manual_seed(seed)
            for _ in range(_AGAIN):
                blurred = [_blurred(x.float(), blur) for x in drawn]
                again = _plain(function, blurred, truth, backward, given)
                plain = [max(pair) for pair in zip(plain, again, strict=True)]
        for each in zip(found, truth, plain, strict=True):
            relative, share = _compare(*each)
            if not share <= worst.share:
                worst = Error(relative, share, "")
    return Error(worst.relative, worst.share, ran[0])


def _equation(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], backward: bool, given: Sequence[Tensor]
) -> list[Tensor]:
    return _outcome(function, inputs, "reference", backward, given)[0]


def _plain(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    truth: Sequence[Tensor],
    backward: bool,
    given: Sequence[Tensor],
) -> list[float]:
    """The largest errors of the equation in float32."""
    found = _equation(function, [x.float() for x in inputs], backward, given)
    return [float((x.double() - y).abs().max()) for x, y in zip(found, truth, strict=True)]


def _blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
    return x + x * noise * torch.finfo(x.dtype).eps


def _compare(found: Tensor, truth: Tensor, plain: float) -> tuple[float, float]:
    """The error relative to the largest number, and relative to the budget."""
    scale = float(truth.abs().max())
    off = float((found.double() - truth).abs().max())
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
    outputs = list(function(*leaves, backend=kernel))
    if not backward:
        return outputs, ()
    given = [torch.randn_like(x) for x in outputs] if given is None else given
    gradients = torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g, x in zip(given, outputs, strict=True)])
    return [*[x.detach() for x in outputs], *gradients], given
