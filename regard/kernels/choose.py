"""Which kernel runs: an ordered list of candidates, each with its reasons to refuse.

The first that does not refuse is taken. `attention(kernel=...)` forces one; `explain` tells what every candidate says;
`chosen` tells which ones ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard import check
from regard.kernels import cpu, differentiate, native, reference, tiled
from regard.kernels import torch as torch_
from regard.kernels.gpu import serve as gpu
from regard.problem import Plan, Problem, flagged


@dataclass(frozen=True)
class Candidate:
    """A kernel: why it cannot serve a problem (None = it can), and how it is run."""

    refuse: Callable[[Plan, Sequence[Tensor]], str | None]
    run: Callable[[Plan, Sequence[Tensor]], tuple[Tensor, ...]]
    about: str
    automatic: bool = True


# In the order of preference (but see `_order`).
_CANDIDATES: dict[str, Candidate] = {
    "cpu": Candidate(cpu.refuse, partial(differentiate.run, "cpu"), "native kernels of the CPU, in linear memory"),
    "torch": Candidate(torch_.refuse, torch_.run, "torch's fused attention, for plain problems"),
    "gpu": Candidate(gpu.refuse, partial(differentiate.run, "gpu"), "Triton kernels of the GPU, in linear memory"),
    "tiled": Candidate(
        tiled.refuse, partial(differentiate.run, "tiled"), "plain PyTorch in strips: everything, in linear memory"
    ),
    "reference": Candidate(
        reference.refuse,
        partial(differentiate.run, "reference"),
        "the equation, materialised: everything, in quadratic memory",
        automatic=False,
    ),
}

_ran: ContextVar[list[str] | None] = ContextVar("ran", default=None)


def run(problem: Problem, kernel: str | None) -> tuple[Tensor, ...]:
    """Run a problem by the kernel that is forced, or by the first that serves it."""
    name = _choose(problem) if kernel is None else _force(problem, kernel)
    if name == "reference" and kernel is None:
        reference.warn(str(_refuse("tiled", problem)), *problem.tensors[:2])
    if not torch.compiler.is_compiling():
        ran = _ran.get()
        if ran is not None:
            ran.append(name)
    run = _CANDIDATES[name].run
    if name != "gpu" and problem.tensors[0].device.type != "cpu":
        return run(*flagged(problem.plan, problem.tensors))
    return run(problem.plan, problem.tensors)


# In half precision, torch's own attention computes on the matrix units (AMX) of the machines that have them: 2 to 4 times
# as fast as the native kernels, which widen to float32.
_MATRIX_UNITS = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _order(problem: Problem) -> tuple[str, ...]:
    if _MATRIX_UNITS and problem.tensors[0].dtype == torch.bfloat16:
        return ("torch", "cpu", *_CANDIDATES)
    # By their interpreter the kernels of the GPU run on the CPU, too, but not unless they are asked for by name.
    on_cpu = problem.tensors[0].device.type == "cpu"
    return tuple([name for name in _CANDIDATES if not (on_cpu and name == "gpu")])


def run_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The output of a call that asks for nothing but q, k and v, by the shortest way: for a short sequence, to take a call
    apart costs more than to compute it. None if anything is out of the ordinary.
    """
    if (
        native.missing or torch.compiler.is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor and q.is_cpu and k.is_cpu and v.is_cpu)
        or (q.dtype != torch.float32 and (_MATRIX_UNITS or not q.is_floating_point()))
        or differentiate.is_differentiated((q, k, v))
    ):  # fmt: skip
        return None
    try:
        out: Tensor | None = native.ops.plain(q, k, v)
    except NotImplementedError:  # a sparse tensor, or one on another device: the check of a call says it in words
        return None
    ran = _ran.get()
    if ran is not None and out is not None:
        ran.append("cpu")
    return out


def _choose(problem: Problem) -> str:
    for name in _order(problem):
        if _CANDIDATES[name].automatic and _refuse(name, problem) is None:
            return name
    return "reference"  # it serves everything


def _refuse(name: str, problem: Problem) -> str | None:
    """Why a candidate cannot serve a problem; None if it can."""
    reason = None if name == "reference" else differentiate.refuse_compiled(problem.plan)
    return _CANDIDATES[name].refuse(problem.plan, problem.tensors) if reason is None else reason


def _force(problem: Problem, kernel: str) -> str:
    if not isinstance(kernel, str) or kernel not in _CANDIDATES:
        expected = f"one of {', '.join(map(repr, _CANDIDATES))}, or None"
        raise check.wrong("kernel", kernel, expected, isinstance(kernel, str))
    reason = _refuse(kernel, problem)
    if reason is not None:
        raise ValueError(f"kernel is {kernel!r}, which cannot serve this problem: {reason}")
    return kernel


@dataclass(frozen=True)
class Explanation:
    """What each candidate says of a problem, in the order of preference: None = it can serve. Prints itself."""

    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = []
        for name, reason in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            automatic = "can serve" if _CANDIDATES[name].automatic else "can serve, when asked for by name"
            lines.append(f"{mark} {name:<10} {'no: ' + reason if reason else automatic}")
        return "\n".join(lines)


def explanation(problem: Problem) -> Explanation:
    """What each candidate says of a problem."""
    reasons = {name: _refuse(name, problem) for name in _CANDIDATES}
    return Explanation(_choose(problem), reasons)


@contextmanager
def chosen() -> Iterator[list[str]]:
    """Collect the names of the kernels that run inside, in order, in this thread.

    >>> with regard.chosen() as ran:
    ...     regard.attention(q, k, v)
    >>> ran
    ['cpu']
    """
    ran: list[str] = []
    token = _ran.set(ran)
    try:
        yield ran
    finally:
        _ran.reset(token)
