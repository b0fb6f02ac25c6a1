"""What a row of the table is to reach, and what it reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regard.bench.error import Error


@dataclass(frozen=True)
class Shape:
    """B batch rows, H query heads, L queries, D width; S keys, G key/value heads, E width of v where they differ (0: they
    do not)."""

    B: int
    H: int
    L: int
    D: int
    S: int = 0
    G: int = 0
    E: int = 0

    @property
    def keys(self) -> int:
        return self.S or self.L

    @property
    def values(self) -> int:
        return self.E or self.D

    @property
    def pairs(self) -> int:
        """Of queries and keys, over all heads."""
        return self.B * self.H * self.L * self.keys

    def __str__(self) -> str:
        return "x".join(str(n) for n in (self.B, self.H, self.L, self.D))


@dataclass(frozen=True)
class Figure:
    """A kind of number: how it is written, and whether more is better."""

    text: str
    more: bool = True

    def write(self, x: float) -> str:
        return self.text.format(x)


FIGURES = {
    "ratio": Figure("{:.2f}x"),  # how many times as fast as the other
    "share": Figure("{:.0%} of peak"),
    "flops": Figure("{:.0f} GFLOP/s"),
    "bytes": Figure("{:.1f} GB/s"),
    "elements": Figure("{:.1f} G/s"),  # elements (i, j, d) a second
    "scaled": Figure("{:.1f} G/s*"),  # the same, were the peak of the machine 466 GFLOP/s
    "cost": Figure("{:.2f} a pair", more=False),  # the time of a pair that is attended to, that of the other being 1
    "extra": Figure("{:+.1%}", more=False),  # time on top of the other
    "time": Figure("{:.2f} of theirs", more=False),
    "memory": Figure("{:.0f} MiB", more=False),
}


def _everywhere(shape: Shape) -> bool:
    return True


@dataclass(frozen=True)
class Goal:
    """A bound of a figure, for those shapes that it is meant for; `at` says which, in words."""

    figure: str
    bound: float
    at: str = ""
    applies: Callable[[Shape], bool] = _everywhere

    def met(self, x: float) -> bool:
        return x >= self.bound if FIGURES[self.figure].more else x <= self.bound

    def __str__(self) -> str:
        sign = ">=" if FIGURES[self.figure].more else "<="
        return f"{sign} {FIGURES[self.figure].write(self.bound).lstrip('+')}{f' at {self.at}' if self.at else ''}"


@dataclass(frozen=True)
class Result:
    """One problem of one row: milliseconds of each side (None: there was no race), the figures by name, and the error.

    A wrong result has no figures.
    """

    row: str
    against: str
    shape: Shape
    kernel: str
    instructions: str
    error: Error
    goals: Sequence[Goal]
    ours_ms: float | None = None
    other_ms: float | None = None
    figures: Mapping[str, float] | None = None

    def meets(self, figure: str) -> bool | None:
        """Whether a figure is what it is to be; None where nothing is asked of it, or it could not be measured."""
        found = [self.met_goal(goal) for goal in self.goals if goal.figure == figure]
        return None if not any(x is not None for x in found) else False not in found

    def met_goal(self, goal: Goal) -> bool | None:
        """Whether one goal is met; None where it is not meant for this shape, or could not be measured."""
        if not goal.applies(self.shape) or not self.figures or goal.figure not in self.figures:
            return None
        return goal.met(self.figures[goal.figure])

    @property
    def met(self) -> bool:
        """Whether it is right, and all that is asked of it is met."""
        return self.figures is not None and all(self.met_goal(goal) is not False for goal in self.goals)
