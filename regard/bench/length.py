"""How much memory a long problem takes, forward and backward, beyond its inputs and outputs: in a process of its own.

`python -m regard.bench.length dot 65536 64 2 ""` is that process: what, the length, the width, the threads, and the kernel.
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
from regard.bench.goal import Goal, Result, Shape
from regard.bench.peak import Peak
from regard.bench.row import Contest
from regard.components.score import Additive

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Length:
    """A row of the table that measures memory; `make` is the contest whose error is measured, at the length `judged`."""

    name: str
    what: str
    shape: Shape
    make: Callable[[Shape], Contest]
    judged: int
    goals: tuple[Goal, ...] = (Goal("memory", 600),)
    against: str = "memory"
    always: bool = False

    @property
    def shapes(self) -> list[Shape]:
        return [self.shape]

    def results(self, peaks: Mapping[str, Peak], seconds: float, threads: int) -> Iterator[Result]:
        """Measure it once, which takes as long as it takes."""
        small = self.make(dataclasses.replace(self.shape, L=min(self.judged, self.shape.L)))
        wrong = error(small.ours, small.inputs, True)
        used = extension.instructions()[0]
        result = Result(self.name, self.against, self.shape, wrong.kernel, used, wrong, self.goals)
        if wrong.within:
            found = memory(self.what, self.shape.L, self.shape.D, threads, used)
            figures = {"memory": found.beyond / 2**20}
            result = dataclasses.replace(result, kernel=found.kernel, ours_ms=found.seconds * 1e3, figures=figures)
        yield result


@dataclass(frozen=True)
class Memory:
    """Bytes beyond inputs and outputs, the seconds that it took, and the kernel that ran."""

    beyond: int
    seconds: float
    kernel: str


def memory(what: str, length: int, width: int, threads: int, instructions: str, kernel: str = "") -> Memory:
    """The memory of one head of so many queries and keys, `what` being "dot" or "additive", by the kernel that is forced."""
    done = subprocess.run(
        [sys.executable, "-m", "regard.bench.length", what, str(length), str(width), str(threads), kernel],
        capture_output=True, text=True, check=False,
        # What is freed goes back at once: the peak is of what is held, not of what the allocator keeps.
        env={**os.environ, "REGARD_INSTRUCTIONS": instructions, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"the process that measures memory has failed: {done.stderr.strip().splitlines()[-1]}")
    return Memory(**json.loads(done.stdout))


def held() -> int:
    """The most bytes that this process has held. Not by `getrusage`, where a child starts from the peak of its parent."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _measure(what: str, length: int, width: int, kernel: str | None) -> Memory:
    words = {"score": Additive(torch.randn(width, requires_grad=True))} if what == "additive" else {}

    def run(n: int) -> tuple[int, int, float]:
        q, k, v = (torch.randn(1, 1, n, width, requires_grad=True) for _ in range(3))
        given, before, start = torch.randn(1, 1, n, width), held(), time.perf_counter()
        out = attention(q, k, v, backend=kernel, **words)  # type: ignore[call-overload]
        out.backward(given)
        gradients = [x.grad for x in (q, k, v) if x.grad is not None]
        assert len(gradients) == 3
        return held() - before, sum(4 * x.numel() for x in (out, *gradients)), time.perf_counter() - start

    run(256)  # what the first call sets up is not the problem's
    with record_backends() as ran:
        grown, outputs, seconds = run(length)
    return Memory(max(grown - outputs, 0), seconds, ran[0])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(asdict(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[5] or None))))
