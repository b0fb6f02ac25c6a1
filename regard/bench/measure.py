"""Interleaved timing of several functions, so that disturbances of the machine affect all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def time_interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: tuple[int, int],
    burst: float,
    seconds: float = 0.0,
) -> list[list[float]]:
    """Time several functions in turns. Return, per function, the seconds per call in each round.

    Args:
        rounds: minimum and maximum number of rounds.
        burst: minimum duration of one timing in seconds; calls are repeated until it is reached.
        seconds: after the minimum number of rounds, continue until this much time has passed.

    >>> from regard.bench.measure import time_interleaved
    >>> order = []
    >>> times = time_interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=(2, 2), burst=0.0)
    >>> "".join(order), [len(x) for x in times]  # two calls of each to warm up, then two rounds
    ('aabbabab', [2, 2])
    """
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, round(burst / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in functions]
    first = time.perf_counter()
    while len(times[0]) < rounds[0] or (len(times[0]) < rounds[1] and time.perf_counter() - first < seconds):
        for function, repeat, taken in zip(functions, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            taken.append((time.perf_counter() - start) / repeat)
    return times


def make_call(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], backward: bool
) -> Callable[[], Sequence[Tensor]]:
    """Return the call to time. With `backward`, it computes the gradients of the inputs from fixed gradients of the outputs.

    >>> from regard.bench.measure import make_call
    >>> x = torch.tensor([1.0, 2.0])
    >>> make_call(lambda x: [3 * x], [x], False)()
    [tensor([3., 6.])]
    >>> (gradient,) = make_call(lambda x: [x.sum(), 2 * x.sum()], [x], True)()
    >>> gradient[0] == gradient[1]
    tensor(True)
    """
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad_outputs = [torch.randn_like(x) for x in function(*leaves)]
    return lambda: torch.autograd.grad(list(function(*leaves)), leaves, grad_outputs, allow_unused=True)
