"""The peaks of this machine, measured with native loops that only multiply and add, or only read memory."""

from __future__ import annotations

import time

import torch

from regard.backends.cpu import extension

# The limits, in the order of `PeakKind` in csrc/problem.h, and their units (1e9 per second).
LIMITS = {"fp32": "GFLOP/s of multiply-adds", "bf16": "GFLOP/s of VDPBF16PS", "read": "GB/s read of memory"}

# Eight times the last-level cache of the tested machines, so that a loop over the buffer reads memory.
_BUFFER = 256 << 20


class Peak:
    """One limit of the machine, with the current number of threads and instruction set.

    Args:
        limit: one of LIMITS.
        seconds: approximate duration of one burst of the loop; "read" reads its buffer at least once.
    """

    def __init__(self, limit: str, seconds: float = 0.01) -> None:
        self._limit = list(LIMITS).index(limit)
        self._buffer = torch.ones(_BUFFER // 4 if limit == "read" else 0)
        # About a millisecond of multiply-adds, next to which waking the threads is negligible.
        self._rounds = 1 if limit == "read" else 100_000
        self.best = 0.0
        self.burst()
        # The minimum of several bursts: on a shared machine, a single one may be slow.
        while self.is_available and (elapsed := min(self.burst() for _ in range(5))) < seconds:
            self._rounds = max(self._rounds + 1, int(self._rounds * min(1.2 * seconds / elapsed, 100.0)))

    @property
    def is_available(self) -> bool:
        """Whether the machine supports the instruction."""
        return self.best > 0

    def burst(self) -> float:
        """Run the loop, and return its duration in seconds. `best` is the highest rate so far, in 1e9 per second."""
        start = time.perf_counter()
        work = float(extension.ops.peak(self._buffer, self._limit, self._rounds))
        elapsed = time.perf_counter() - start
        self.best = max(self.best, work / elapsed / 1e9)
        return elapsed
