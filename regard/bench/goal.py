"""Shapes, metrics, goals and results of the rows of the benchmark tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regard.bench.error import Error


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem: B batch, H query heads, L queries, D query/key width; and S keys, G key/value heads, E value
    width, where 0 means the same as L, H and D.

    >>> from regard.bench.goal import Shape
    >>> Shape(2, 3, 16, 8, S=32).pairs  # 2 * 3 * 16 * 32
    3072
    """

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
        """Number of query-key pairs, over all heads."""
        return self.B * self.H * self.L * self.keys

    def __str__(self) -> str:
        return "x".join(str(n) for n in (self.B, self.H, self.L, self.D))


@dataclass(frozen=True)
class Metric:
    """A measured quantity: its format, and whether higher values are better.

    >>> from regard.bench.goal import METRICS
    >>> METRICS["ratio"].write(2.5), METRICS["ratio"].is_higher_better, METRICS["memory"].is_higher_better
    ('2.50x', True, False)
    """

    text: str
    is_higher_better: bool = True

    def write(self, x: float) -> str:
        """Format a value."""
        return self.text.format(x)


METRICS = {
    "ratio": Metric("{:.2f}x"),  # the baseline's time divided by ours
    "share": Metric("{:.0%} of peak"),
    "flops": Metric("{:.0f} GFLOP/s"),
    "bytes": Metric("{:.1f} GB/s"),
    "elements": Metric("{:.1f} G/s"),  # elements (i, j, d) per second
    "scaled": Metric("{:.1f} G/s*"),  # the same, scaled to a machine with a peak of 466 GFLOP/s
    "cost": Metric("{:.2f} per pair", is_higher_better=False),  # time per attended pair, relative to the baseline's
    "extra": Metric("{:+.1%}", is_higher_better=False),  # additional time, relative to the baseline's
    "time": Metric("{:.2f} of theirs", is_higher_better=False),
    "memory": Metric("{:.0f} MiB", is_higher_better=False),
}


def _everywhere(shape: Shape) -> bool:
    return True


@dataclass(frozen=True)
class Goal:
    """A bound of a metric, for the shapes for which `applies` holds; `at` describes these.

    >>> from regard.bench.goal import Goal
    >>> goal = Goal("extra", 0.2, "L = 4096", lambda shape: shape.L == 4096)
    >>> str(goal), goal.met(0.1), goal.met(0.3)
    ('<= 20.0% at L = 4096', True, False)
    """

    metric: str
    bound: float
    at: str = ""
    applies: Callable[[Shape], bool] = _everywhere

    def met(self, x: float) -> bool:
        return x >= self.bound if METRICS[self.metric].is_higher_better else x <= self.bound

    def __str__(self) -> str:
        sign = ">=" if METRICS[self.metric].is_higher_better else "<="
        return f"{sign} {METRICS[self.metric].write(self.bound).lstrip('+')}{f' at {self.at}' if self.at else ''}"


@dataclass(frozen=True)
class RowResult:
    """The result of one row for one shape: the error, the times in milliseconds (None if not timed), and the metrics.

    A wrong result has no metrics.
    """

    row: str
    against: str
    shape: Shape
    backend: str
    instructions: str
    error: Error
    goals: Sequence[Goal]
    ours_ms: float | None = None
    other_ms: float | None = None
    metrics: Mapping[str, float] | None = None

    def meets(self, metric: str) -> bool | None:
        """Return whether all goals of a metric are met; None if there are none, or if it could not be measured."""
        met = [self.met_goal(goal) for goal in self.goals if goal.metric == metric]
        return None if not any(x is not None for x in met) else False not in met

    def met_goal(self, goal: Goal) -> bool | None:
        """Return whether a goal is met; None if it does not apply to this shape, or could not be measured."""
        if not goal.applies(self.shape) or not self.metrics or goal.metric not in self.metrics:
            return None
        return goal.met(self.metrics[goal.metric])

    @property
    def met(self) -> bool:
        """Whether the result is correct, and meets all goals."""
        return self.metrics is not None and all(self.met_goal(goal) is not False for goal in self.goals)
