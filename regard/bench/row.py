"""A row of the table: problems of several shapes, ours and another way to do them, timed in turns."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from regard.backends.choose import record_backends
from regard.backends.cpu import extension
from regard.bench.error import error
from regard.bench.goal import Goal, Result, Shape
from regard.bench.measure import race, ready
from regard.bench.peak import Peak

Outputs = Sequence[Tensor]

# Forward takes two products, backward five, of which one is a score computed again.
_BACKWARD = 3.5
# The peak of the machine that the goal of additive attention was set on.
_ELEMENTS_PEAK = 466.0


@dataclass(frozen=True)
class Contest:
    """One problem, and two ways to do it; both take what `inputs` gives.

    Args:
        ours: takes the name of a `kernel` besides.
        pairs: how many pairs of query and key ours attends to, over all heads.
        other_pairs: how many the other computes.
    """

    inputs: Callable[[], list[Tensor]]
    ours: Callable[..., Outputs]
    other: Callable[..., Outputs]
    pairs: float
    other_pairs: float


@dataclass(frozen=True)
class Row:
    """Args:
    name: what is done.
    against: what it is measured against.
    make: the contest of a shape.
    goals: the first one's figure is that of the row.
    limit: what bounds it, of `regard.bench.peak.LIMITS`.
    counts: what its work is counted in: flops, bytes or elements (i, j, d).
    judged: at what length the error is measured, where the row is longer.
    copies: so many inputs, taken in turns, are too large for the caches.
    instructions: the set that ours is forced to; the fastest by default.
    always: whether it is run unless another is asked for.
    """

    name: str
    against: str
    make: Callable[[Shape], Contest]
    shapes: Sequence[Shape]
    goals: Sequence[Goal]
    backward: bool = False
    limit: str = "fp32"
    counts: str = "flops"
    judged: int = 1024
    copies: int = 1
    instructions: str = ""
    always: bool = True

    def results(self, peaks: Mapping[str, Peak], seconds: float, threads: int) -> Iterator[Result]:
        """Measure each shape for about so many seconds; what is wrong is not timed."""
        for shape in self.shapes:
            yield self._result(shape, peaks[self.limit], seconds)

    def _result(self, shape: Shape, peak: Peak, seconds: float) -> Result:
        small = self.make(_smaller(shape, self.judged))
        contest = self.make(shape)
        with forced(self.instructions):
            wrong = error(small.ours, small.inputs, self.backward)
            used = extension.instructions()[0]
        result = Result(self.name, self.against, shape, wrong.kernel, used, wrong, self.goals)
        if not wrong.within:
            return result
        inputs = [contest.inputs() for _ in range(self.copies)]
        with record_backends() as ran:
            ours = _in_turns([ready(contest.ours, x, self.backward) for x in inputs])
            ours()
        other = _in_turns([ready(contest.other, x, self.backward) for x in inputs])

        def ours_forced() -> object:
            with forced(self.instructions):
                return ours()

        functions = [ours_forced if self.instructions else ours, other, *([peak.burst] if peak.exists else [])]
        times = race(functions, rounds=(3, 25), burst=0.01, seconds=seconds)
        ours_s, other_s = (statistics.median(x) for x in times[:2])
        figures = {
            "ratio": other_s / ours_s,
            "cost": ours_s / contest.pairs / (other_s / contest.other_pairs),
            "extra": ours_s / other_s - 1,
            "time": ours_s / other_s,
        }
        rate = _WORK[self.counts](shape, contest, self.backward, inputs[0]) / ours_s / 1e9
        figures[self.counts] = rate
        # Of the best burst so far: the peak is what the machine can do, and a slow burst only tells that others used it.
        if peak.exists and self.counts == "elements":
            figures["scaled"] = rate / peak.best * _ELEMENTS_PEAK
        elif peak.exists:
            figures["share"] = rate / peak.best
        return dataclasses.replace(result, kernel=ran[0], ours_ms=ours_s * 1e3, other_ms=other_s * 1e3, figures=figures)


def _smaller(shape: Shape, length: int) -> Shape:
    """As long as can be materialised in float64, and of few heads. A single query is little work whatever its keys."""
    if shape.L == 1:
        return shape
    B, H = min(shape.B, 2), min(shape.H, 2)
    return dataclasses.replace(shape, B=B, H=H, L=min(shape.L, length))


@contextmanager
def forced(instructions: str) -> Iterator[None]:
    """Inside, the native kernels are those of this instruction set; an empty name changes nothing."""
    if not instructions:
        yield
        return
    before = extension.instructions()[0]
    extension.ops.use(instructions)
    try:
        yield
    finally:
        extension.ops.use(before)


def _in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _flops(shape: Shape, contest: Contest, backward: bool, inputs: Sequence[Tensor]) -> float:
    return 2.0 * contest.pairs * (shape.D + shape.values) * (_BACKWARD if backward else 1.0)


def _bytes(shape: Shape, contest: Contest, backward: bool, inputs: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in inputs))


def _elements(shape: Shape, contest: Contest, backward: bool, inputs: Sequence[Tensor]) -> float:
    return contest.pairs * shape.D


# How much work a problem is, in what may be counted.
_WORK = {"flops": _flops, "bytes": _bytes, "elements": _elements}
