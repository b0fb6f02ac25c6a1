"""Error budgets of backends, measured on the data of each test.

The baseline is the same equation in plain torch operations, in the precision of the backend. A backend may make twice
the rounding error of the baseline, plus a few roundings of its result. Both errors are measured against the float64
oracle on the same inputs. So a backend that drops a key or uses a wrong scale fails, and one that only rounds passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Additional roundings of a result, in units in the last place (ULP) of its largest element.
_ROUNDINGS = 4.0
# With at least this many elements, the largest rounding error does not depend on chance.
_MANY = 256


@dataclass(frozen=True)
class ErrorBudget:
    """The reference of a result, and the error that is allowed.

    Args:
        exact: the result of the float64 oracle.
        baseline: the equation of the oracle, computed in another precision on the same inputs.
        eps_ratio: machine epsilon of the backend divided by that of `baseline`; 1 if they have the same precision.
        size: magnitude of the terms whose sum the result is, if they may cancel; that of `exact` by default.
        cancelled: magnitude of intermediate terms that cancel, in the precision of the backend.
        largest: magnitude of the largest related result: the oracle may round at this size where its result is nearly
            0.
        relative: largest relative error of the baselines of related results. It replaces the error of this baseline if
            the result has few elements, where the error may be (nearly) 0 by chance.
        least: largest error of the baseline in repeated measurements.
    """

    exact: Tensor
    baseline: Tensor
    eps_ratio: float = 1.0
    size: float = 0.0
    cancelled: float = 0.0
    largest: float = 0.0
    relative: float = 0.0
    least: float = 0.0

    @property
    def scale(self) -> float:
        """The magnitude of the result, or of the terms whose sum it is."""
        exact = self.exact.detach()
        finite = exact[exact.isfinite()]
        return max(finite.abs().max().item(), self.size) if finite.numel() else self.size

    @property
    def error(self) -> float:
        """The largest error of the baseline."""
        exact = self.exact.detach()
        error = (self.baseline.detach().double() - exact)[exact.isfinite()].abs()
        largest = error.max().item() if error.numel() else 0.0
        assert math.isfinite(largest), "the baseline is NaN or inf where the reference is finite"
        return max(largest, self.least)

    def allowed_error(self, dtype: torch.dtype) -> float:
        """Return the largest absolute error allowed for a result of this dtype."""
        error = self.error
        if self.exact.numel() < _MANY:
            error = 2 * max(error, self.relative * self.scale)
        # The oracle rounds too, which counts if the backend is as precise as the oracle.
        error *= 2 if self.eps_ratio == 1 else 3 * self.eps_ratio
        error += _ROUNDINGS * torch.finfo(torch.float64).eps * self.largest
        working = torch.float64 if dtype == torch.float64 else torch.float32
        error += _ROUNDINGS * torch.finfo(working).eps * self.cancelled
        # Below the smallest normal number, a unit in the last place no longer shrinks with the number.
        return error + _ROUNDINGS * torch.finfo(dtype).eps * max(self.scale, torch.finfo(dtype).tiny)


class OverBudgetError(AssertionError):
    """The error of a result exceeds its budget."""


def link_budgets(budgets: dict[str, ErrorBudget], least: float = 0.0) -> dict[str, ErrorBudget]:
    """Set `largest` and `relative` of each budget from all of them; `least` is the least value of `largest`."""
    largest = max([least, *(y.scale for y in budgets.values())])
    relative = max([y.error / y.scale for y in budgets.values() if y.scale > 0], default=0.0)
    return {name: replace(y, largest=largest, relative=relative) for name, y in budgets.items()}


def assert_within_budget(name: str, got: Tensor, budget: ErrorBudget, where: Tensor | None = None) -> float:
    """Raise an OverBudgetError if the error of a result exceeds its budget, and an AssertionError if the result is NaN
    or inf where the reference is not, or the reverse. Return the fraction of the budget that was used.

    `where` (bool, broadcasts to the result) selects the elements to compare.
    """
    exact = budget.exact.detach()
    assert got.shape == exact.shape, f"{name}: has shape {tuple(got.shape)}; the oracle has {tuple(exact.shape)}"
    selected = torch.ones(exact.shape, dtype=torch.bool) if where is None else where.expand(exact.shape)
    nonfinite, nonfinite_exact = ~got.isfinite() & selected, ~exact.isfinite() & selected
    assert torch.equal(nonfinite, nonfinite_exact), (
        f"{name}: {int(nonfinite.sum())} not finite; the oracle has {int(nonfinite_exact.sum())}"
    )
    same = got.detach().double()[nonfinite] == exact[nonfinite]
    assert bool(same.all()), f"{name}: NaN, or inf of the wrong sign"
    error = torch.where(selected & ~nonfinite, got.detach().double() - exact, 0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    allowed = budget.allowed_error(got.dtype)
    if worst > allowed:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise OverBudgetError(
            f"{name}: error {worst:.3g} at {index}, {got[index].item():.9g} for {exact[index].item():.9g}; the budget is "
            f"{allowed:.3g}, exceeded by a factor of {worst / allowed if allowed else math.inf:.3g}"
        )
    return worst / allowed if allowed else 0.0
