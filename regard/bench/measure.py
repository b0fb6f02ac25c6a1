"""How time is taken: of several functions in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def race(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: tuple[int, int],
    burst: float,
    seconds: float = 0.0,
) -> list[list[float]]:
    """The seconds that a call of each function takes, as often as there were rounds.

    Args:
        rounds: at least and at most so many.
        burst: how long one timing takes at least, calls being repeated.
        seconds: go on for so long, from the least of the rounds to the most.
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


def ready(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], backward: bool
) -> Callable[[], Sequence[Tensor]]:
    """The call as it is timed: with `backward` it gives the gradients of the inputs that it uses, from fixed ones of the
    outputs.
    """
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    given = [torch.randn_like(x) for x in function(*leaves)]
    return lambda: torch.autograd.grad(list(function(*leaves)), leaves, given, allow_unused=True)
