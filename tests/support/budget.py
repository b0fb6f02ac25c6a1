"""The error budget of a kernel, from the data.

The same equation, done the plain way in the precision that the kernel works in, makes rounding errors of its own. A
kernel may make twice as many, and round its result once or twice besides; both are measured against the float64 oracle,
on the same inputs. So a kernel that is wrong, by a key or a scale, is told from one that rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How often a result may be rounded besides: in units of its last place, at the size of the largest.
_ROUNDINGS = 4.0
# In so many numbers, the largest rounding error is no matter of luck.
_MANY = 256


@dataclass(frozen=True)
class Yardstick:
    """What a result should be, and what the plain way makes of it.

    Args:
        exact: the float64 oracle.
        straight: the oracle's equation, done in another precision on the same inputs.
        grain: the precision of the kernel, relative to that of `straight`: 1 where they are the same.
        size: how large the terms are that the result is a sum of, where they may cancel; that of `exact` by default.
        cancelled: how large the terms are that cancel one another on the way, in the precision that the kernel works in.
        largest: the size of the largest sibling: what the oracle may round at, where its own result is all but 0.
        relative: the errors of the plain way in sibling results, relative to their sizes: it stands in for the own
            error where that is the error of a few numbers, which luck can make 0 (or half of what it might have been).
        least: the largest error of the plain way where it was measured more often.
    """

    exact: Tensor
    straight: Tensor
    grain: float = 1.0
    size: float = 0.0
    cancelled: float = 0.0
    largest: float = 0.0
    relative: float = 0.0
    least: float = 0.0

    @property
    def scale(self) -> float:
        """The size of the result, or of the terms that it is a sum of."""
        exact = self.exact.detach()
        numbers = exact[exact.isfinite()]
        return max(numbers.abs().max().item(), self.size) if numbers.numel() else self.size

    @property
    def error(self) -> float:
        """The largest error of the plain way."""
        exact = self.exact.detach()
        error = (self.straight.detach().double() - exact)[exact.isfinite()].abs()
        largest = error.max().item() if error.numel() else 0.0
        assert math.isfinite(largest), "the plain way gave NaN or inf: it is no yardstick"
        return max(largest, self.least)

    def budget(self, dtype: torch.dtype) -> float:
        """How far a result of this dtype may be off, in the units of the result."""
        error = self.error
        if self.exact.numel() < _MANY:
            error = 2 * max(error, self.relative * self.scale)
        # The oracle rounds as well: that counts where the kernel is as precise.
        error *= 2 if self.grain == 1 else 3 * self.grain
        error += _ROUNDINGS * torch.finfo(torch.float64).eps * self.largest
        working = torch.float64 if dtype == torch.float64 else torch.float32
        error += _ROUNDINGS * torch.finfo(working).eps * self.cancelled
        # Below the smallest normal number, the last place no longer shrinks with the number.
        return error + _ROUNDINGS * torch.finfo(dtype).eps * max(self.scale, torch.finfo(dtype).tiny)


class OverBudgetError(AssertionError):
    """A result is farther off than its budget allows."""


def related(yardsticks: dict[str, Yardstick], least: float = 0.0) -> dict[str, Yardstick]:
    """Yardsticks by name that know of one another; they come of numbers of the size `least`, even where all are 0."""
    largest = max([least, *(y.scale for y in yardsticks.values())])
    relative = max([y.error / y.scale for y in yardsticks.values() if y.scale > 0], default=0.0)
    return {name: replace(y, largest=largest, relative=relative) for name, y in yardsticks.items()}


def check(name: str, got: Tensor, yardstick: Yardstick, where: Tensor | None = None) -> float:
    """Raise an OverBudgetError where a kernel's result is off by too much, and an AssertionError where NaN or inf stands in
    other places than it should; give the share of the budget that was used.

    `where` (bool, broadcasts to the result) are the places to look at.
    """
    exact = yardstick.exact.detach()
    assert got.shape == exact.shape, f"{name}: has shape {tuple(got.shape)}; the oracle has {tuple(exact.shape)}"
    look = torch.ones(exact.shape, dtype=torch.bool) if where is None else where.expand(exact.shape)
    wild, wild_exact = ~got.isfinite() & look, ~exact.isfinite() & look
    assert torch.equal(wild, wild_exact), (
        f"{name}: {int(wild.sum())} not finite; the oracle has {int(wild_exact.sum())}"
    )
    same = got.detach().double()[wild] == exact[wild]
    assert bool(same.all()), f"{name}: NaN, or inf of the wrong sign"
    error = torch.where(look & ~wild, got.detach().double() - exact, 0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    allowed = yardstick.budget(got.dtype)
    if worst > allowed:
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise OverBudgetError(
            f"{name}: off by {worst:.3g} at {place}, {got[place].item():.9g} for {exact[place].item():.9g}; the budget is "
            f"{allowed:.3g}, {worst / allowed if allowed else math.inf:.3g} times less"
        )
    return worst / allowed if allowed else 0.0
