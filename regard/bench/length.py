"""Peak memory of a long problem, forward and backward, in addition to its inputs and outputs, measured in its own process.

That process is `python -m regard.bench.length dot 65536 64 2 ""`: score, length, width, number of threads, and backend.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from regard.attention import attention
from regard.backends.choose import record_backends
from regard.backends.cpu import extension
from regard.bench.error import error
from regard.bench.goal import Goal, RowResult, Shape
from regard.bench.peak import Peak
from regard.bench.row import Implementations
from regard.components.score import Additive

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryRow:
    """A row of the table that measures memory.

    Args:
        score: "dot" or "additive".
        make: the implementations of a shape, of which ours is checked against float64.
        error_length: the length at which the error is measured.
    """

    name: str
    score: str
    shape: Shape
    make: Callable[[Shape], Implementations]
    error_length: int
    goals: tuple[Goal, ...] = (Goal("memory", 600),)
    against: str = "memory"
    always: bool = False

    @property
    def shapes(self) -> list[Shape]:
        return [self.shape]

    def results(self, peaks: Mapping[str, Peak], seconds: float, threads: int) -> Iterator[RowResult]:
        """Measure the row once; `seconds` has no effect."""
        small = self.make(dataclasses.replace(self.shape, L=min(self.error_length, self.shape.L)))
        measured = error(small.ours, small.inputs, True)
        instructions = extension.instructions()[0]
        result = RowResult(
            self.name, self.against, self.shape, measured.backend, instructions, measured, self.goals
        )  # fmt: skip
        if measured.within:
            usage = memory(self.score, self.shape.L, self.shape.D, threads, instructions)
            metrics = {"memory": usage.beyond / 2**20}
            result = dataclasses.replace(result, backend=usage.backend, ours_ms=usage.seconds * 1e3, metrics=metrics)
        yield result


@dataclass(frozen=True)
class MemoryUsage:
    """Peak bytes in addition to inputs and outputs, the time in seconds, and the backend that ran."""

    beyond: int
    seconds: float
    backend: str


def memory(score: str, length: int, width: int, threads: int, instructions: str, backend: str = "") -> MemoryUsage:
    """Measure the memory of one head with `length` queries and keys, forward and backward.

    Args:
        score: "dot" or "additive".
        instructions: the instruction set of the native kernels.
        backend: the backend to use; the empty string lets regard choose.
    """
    done = subprocess.run(
        [sys.executable, "-m", "regard.bench.length", score, str(length), str(width), str(threads), backend],
        capture_output=True, text=True, check=False,
        # Freed memory is returned to the system at once, so that the peak does not count what the allocator keeps.
        env={**os.environ, "REGARD_INSTRUCTIONS": instructions, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1]}")
    return MemoryUsage(**json.loads(done.stdout))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes. (In `getrusage`, a child starts from the peak of its parent.)"""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _measure(score: str, length: int, width: int, backend: str | None) -> MemoryUsage:
    arguments = {"score": Additive(torch.randn(width, requires_grad=True))} if score == "additive" else {}

    def run(n: int) -> tuple[int, int, float]:
        q, k, v = (torch.randn(1, 1, n, width, requires_grad=True) for _ in range(3))
        dout, before, start = torch.randn(1, 1, n, width), peak_memory(), time.perf_counter()
        out = attention(q, k, v, backend=backend, **arguments)  # type: ignore[call-overload]
        out.backward(dout)
        gradients = [x.grad for x in (q, k, v) if x.grad is not None]
        assert len(gradients) == 3
        return peak_memory() - before, sum(4 * x.numel() for x in (out, *gradients)), time.perf_counter() - start

    run(256)  # one-time allocations of the first call do not count
    with record_backends() as ran:
        increase, outputs, seconds = run(length)
    return MemoryUsage(max(increase - outputs, 0), seconds, ran[0])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(asdict(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[5] or None))))
