"""The error of a result against float64, and the error budget that rounding allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.choose import record_backends

# Roundings allowed besides the baseline's error, in units in the last place (ulp) of the largest element.
_ROUNDINGS = 4.0
# With at least this many elements, the largest error of the baseline is reliable; with fewer, it may be small by chance.
_MANY = 256
# Number of random inputs; the largest error counts.
_DRAWS = 2
# Number of further baseline measurements if a result exceeds the budget, since the first may be accurate by chance.
_RETRIES = 16


@dataclass(frozen=True)
class Error:
    """The error of the least accurate output or gradient.

    Args:
        relative: largest absolute error divided by the largest absolute value.
        share: the error divided by its budget; the result is wrong if this is above 1 or NaN.
        backend: the backend that was measured.
    """

    relative: float
    share: float
    backend: str

    @property
    def within(self) -> bool:
        return self.share <= 1.0


def error(function: Callable[..., Sequence[Tensor]], inputs: Callable[[], Sequence[Tensor]], backward: bool) -> Error:
    """Measure the error of a function of `inputs()` that also takes the argument `backend`.

    The reference is the materialized equation in float64. The budget is twice the error of the baseline, which is the same
    equation in float32 (the precision in which all backends accumulate), plus a few roundings to the dtype of the result.
    The largest error often comes from a single element, which the baseline may compute accurately by chance. If a result
    exceeds the budget, the baseline is therefore measured again, on inputs that are perturbed by up to half an ulp.

    >>> from regard.bench.error import error
    >>> def inputs():
    ...     return [torch.randn(1, 2, 40, 8) for _ in range(3)]
    >>> def correct(q, k, v, backend):
    ...     return [regard.attention(q, k, v, backend=backend)]
    >>> def wrong(q, k, v, backend):  # except for the reference, scores are too large
    ...     return correct(q if backend else 1.01 * q, k, v, backend)
    >>> error(correct, inputs, True).within, error(wrong, inputs, True).within
    (True, False)
    """
    worst = Error(0.0, 0.0, "")
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        drawn = list(inputs())
        with record_backends() as ran:
            results, grad_outputs = _evaluate(function, drawn, None, backward)
        reference = _equation(function, [x.double() for x in drawn], backward, grad_outputs)
        baseline = _baseline_errors(function, drawn, reference, backward, grad_outputs)
        if any(not _compare(*each)[1] <= 1.0 for each in zip(results, reference, baseline, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(_RETRIES):
                perturbed = [_perturb(x.float(), generator) for x in drawn]
                again = _baseline_errors(function, perturbed, reference, backward, grad_outputs)
                baseline = [max(pair) for pair in zip(baseline, again, strict=True)]
        for each in zip(results, reference, baseline, strict=True):
            relative, share = _compare(*each)
            if not share <= worst.share:
                worst = Error(relative, share, "")
    return Error(worst.relative, worst.share, ran[0])


def _equation(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], backward: bool, grad_outputs: Sequence[Tensor]
) -> list[Tensor]:
    return _evaluate(function, inputs, "reference", backward, grad_outputs)[0]


def _baseline_errors(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    reference: Sequence[Tensor],
    backward: bool,
    grad_outputs: Sequence[Tensor],
) -> list[float]:
    """Return the largest absolute error of the equation in float32, per output and gradient."""
    results = _equation(function, [x.float() for x in inputs], backward, grad_outputs)
    return [float((x.double() - y).abs().max()) for x, y in zip(results, reference, strict=True)]


def _perturb(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
    return x + x * noise * torch.finfo(x.dtype).eps


def _compare(result: Tensor, reference: Tensor, baseline: float) -> tuple[float, float]:
    """Return the error relative to the largest absolute value, and relative to the budget."""
    scale = float(reference.abs().max())
    distance = float((result.double() - reference).abs().max())
    budget = (2 if reference.numel() >= _MANY else 4) * baseline + _ROUNDINGS * torch.finfo(result.dtype).eps * scale
    if math.isnan(distance):
        return math.nan, math.inf
    return distance / scale if scale else distance, distance / budget if budget else math.inf if distance else 0.0


def _evaluate(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    backend: str | None,
    backward: bool,
    grad_outputs: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return the outputs (and, if `backward`, the gradients of the inputs), and the gradients of the outputs."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    outputs = list(function(*leaves, backend=backend))
    if not backward:
        return outputs, ()
    grad_outputs = [torch.randn_like(x) for x in outputs] if grad_outputs is None else grad_outputs
    cast = [g.to(x.dtype) for g, x in zip(grad_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, cast)
    return [*[x.detach() for x in outputs], *gradients], grad_outputs
