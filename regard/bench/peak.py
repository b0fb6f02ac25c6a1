"""The most that this machine can do: native loops of nothing but multiply-adds, and of nothing but reads."""

from __future__ import annotations

import time

import torch

from regard.backends.cpu import extension

# What can be the limit, as `Limit` in csrc/problem.h counts it, and the unit of a thousand million a second.
LIMITS = {"fp32": "GFLOP/s of multiply-adds", "bf16": "GFLOP/s of VDPBF16PS", "read": "GB/s read of memory"}

# Eight times the last cache of the machines at hand, so that a loop over it reads memory.
_BUFFER = 256 << 20


class Peak:
    """One limit of the machine, on the threads and the instruction set in use.

    Args:
        limit: one of LIMITS.
        seconds: how long a burst of the loop takes, about; a read goes once over its buffer at the least.
    """

    def __init__(self, limit: str, seconds: float = 0.01) -> None:
        self._limit = list(LIMITS).index(limit)
        self._buffer = torch.ones(_BUFFER // 4 if limit == "read" else 0)
        # Multiply-adds of about a millisecond: what wakes the threads is little beside.
        self._rounds = 1 if limit == "read" else 100_000
        self.best = 0.0
        self.burst()
        # The least of several: where others use the machine, a short burst may take long.
        while self.exists and (taken := min(self.burst() for _ in range(5))) < seconds:
            self._rounds = max(self._rounds + 1, int(self._rounds * min(1.2 * seconds / taken, 100.0)))

    @property
    def exists(self) -> bool:
        """Whether the machine has the instruction, or memory to read."""
        return self.best > 0

    def burst(self) -> float:
        """Run the loop; how many seconds it took. `best` is the most that it did a second so far, in thousand millions."""
        start = time.perf_counter()
        work = float(extension.ops.peak(self._buffer, self._limit, self._rounds))
        taken = time.perf_counter() - start
        self.best = max(self.best, work / taken / 1e9)
        return taken
