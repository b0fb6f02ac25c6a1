"""Rows of the CPU benchmark: problems of several shapes, timed in turns with a baseline implementation."""

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
from regard.bench.goal import Goal, RowResult, Shape
from regard.bench.measure import make_call, time_interleaved
from regard.bench.peak import Peak

Outputs = Sequence[Tensor]

# FLOPs of forward + backward, relative to forward: forward has two matrix products, backward has five (one recomputes the
# scores).
_BACKWARD = 3.5
# Peak in GFLOP/s of the machine on which the goal of additive attention was set.
_ELEMENTS_PEAK = 466.0


@dataclass(frozen=True)
class Implementations:
    """Two implementations of one problem, which take the tensors that `inputs()` returns.

    Args:
        ours: also takes the keyword argument `backend`.
        other: the baseline.
        pairs: number of query-key pairs that ours computes, over all heads.
        other_pairs: number of pairs that the baseline computes.
    """

    inputs: Callable[[], list[Tensor]]
    ours: Callable[..., Outputs]
    other: Callable[..., Outputs]
    pairs: float
    other_pairs: float


@dataclass(frozen=True)
class CpuRow:
    """A problem in several shapes.

    Args:
        name: the problem.
        against: name of the baseline.
        make: returns the implementations for a shape.
        goals: bounds of metrics; the first metric is the main one of the row.
        limit: the limit of the machine that bounds the row, one of `regard.bench.peak.LIMITS`.
        counts: unit of work: flops, bytes or elements (i, j, d).
        error_length: length at which the error is measured, if the row is longer.
        copies: number of inputs to alternate between, so that they do not fit in the caches.
        instructions: instruction set of our kernels; the fastest by default.
        always: whether the row runs by default.
    """

    name: str
    against: str
    make: Callable[[Shape], Implementations]
    shapes: Sequence[Shape]
    goals: Sequence[Goal]
    backward: bool = False
    limit: str = "fp32"
    counts: str = "flops"
    error_length: int = 1024
    copies: int = 1
    instructions: str = ""
    always: bool = True

    def results(self, peaks: Mapping[str, Peak], seconds: float, threads: int) -> Iterator[RowResult]:
        """Measure each shape for about `seconds`. Wrong results are not timed."""
        for shape in self.shapes:
            yield self._result(shape, peaks[self.limit], seconds)

    def _result(self, shape: Shape, peak: Peak, seconds: float) -> RowResult:
        small = self.make(_shrink(shape, self.error_length))
        implementations = self.make(shape)
        with use_instructions(self.instructions):
            measured = error(small.ours, small.inputs, self.backward)
            used = extension.instructions()[0]
        result = RowResult(self.name, self.against, shape, measured.backend, used, measured, self.goals)
        if not measured.within:
            return result
        inputs = [implementations.inputs() for _ in range(self.copies)]
        with record_backends() as ran:
            ours = _alternate([make_call(implementations.ours, x, self.backward) for x in inputs])
            ours()
        other = _alternate([make_call(implementations.other, x, self.backward) for x in inputs])

        def ours_with_instructions() -> object:
            with use_instructions(self.instructions):
                return ours()

        functions = [
            ours_with_instructions if self.instructions else ours,
            other,
            *([peak.burst] if peak.is_available else []),
        ]
        times = time_interleaved(functions, rounds=(3, 25), burst=0.01, seconds=seconds)
        ours_s, other_s = (statistics.median(x) for x in times[:2])
        metrics = {
            "ratio": other_s / ours_s,
            "cost": ours_s / implementations.pairs / (other_s / implementations.other_pairs),
            "extra": ours_s / other_s - 1,
            "time": ours_s / other_s,
        }
        rate = _WORK[self.counts](shape, implementations, self.backward, inputs[0]) / ours_s / 1e9
        metrics[self.counts] = rate
        # Relative to the best burst so far: a slow burst only means that other processes used the machine.
        if peak.is_available and self.counts == "elements":
            metrics["scaled"] = rate / peak.best * _ELEMENTS_PEAK
        elif peak.is_available:
            metrics["share"] = rate / peak.best
        return dataclasses.replace(
            result, backend=ran[0], ours_ms=ours_s * 1e3, other_ms=other_s * 1e3, metrics=metrics
        )


def _shrink(shape: Shape, length: int) -> Shape:
    """Reduce a shape so that it can be materialized in float64. A single query is cheap with any number of keys."""
    if shape.L == 1:
        return shape
    B, H = min(shape.B, 2), min(shape.H, 2)
    return dataclasses.replace(shape, B=B, H=H, L=min(shape.L, length))


@contextmanager
def use_instructions(instructions: str) -> Iterator[None]:
    """Use the native kernels of an instruction set within the context; the empty string changes nothing."""
    if not instructions:
        yield
        return
    before = extension.instructions()[0]
    extension.ops.use(instructions)
    try:
        yield
    finally:
        extension.ops.use(before)


def _alternate(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that runs the next of the calls each time, cyclically."""
    if len(calls) == 1:
        return calls[0]
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


def _flops(shape: Shape, implementations: Implementations, backward: bool, inputs: Sequence[Tensor]) -> float:
    return 2.0 * implementations.pairs * (shape.D + shape.values) * (_BACKWARD if backward else 1.0)


def _bytes(shape: Shape, implementations: Implementations, backward: bool, inputs: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in inputs))


def _elements(shape: Shape, implementations: Implementations, backward: bool, inputs: Sequence[Tensor]) -> float:
    return implementations.pairs * shape.D


# The work of a problem, by unit.
_WORK = {"flops": _flops, "bytes": _bytes, "elements": _elements}
