"""Which backend runs: the first of the table that is for the device of q and does not refuse.

`attention(backend=...)` forces one, `explain` returns what each of them says, `record_backends` which ones ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.backends import autograd, compiled_ops, reference
from regard.backends.registry import BACKENDS, LAST_RESORT, PLAIN
from regard.components.summary import Summary
from regard.plan.cache import derived
from regard.plan.nonfinite import flag_nonfinite
from regard.plan.problem import Plan, Problem
from regard.tracing import is_forward_mode, is_symbolic, is_tracing, is_transformed

_ran: ContextVar[list[str] | None] = ContextVar("ran", default=None)


def run(problem: Problem, name: str | None) -> tuple[Tensor, ...]:
    """Run a problem by the backend of this name, or by the first that serves it."""
    forced = name is not None
    name = _choose(problem) if name is None else _force(problem, name)
    if name == LAST_RESORT and not forced:
        q, k = problem.tensors[:2]
        reference.warn(str(_refuse(_order(q, problem.is_eager)[-1], problem)), q, k)
    backend, plan = BACKENDS[name], problem.plan
    tensors: Sequence[Tensor] = problem.tensors
    is_graph = not problem.is_eager and is_symbolic(*tensors[:3])
    if not is_graph:
        ran = _ran.get()
        if ran is not None:
            ran.append(name)
    if not backend.masks_nonfinite and masks_nonfinite(None, tensors[0]):
        # Flags were left out for the sake of a backend that then refused.
        plan, tensors = flag_nonfinite(plan, tensors)
    if backend.is_differentiable and (backend.has_all_derivatives or is_graph or is_tracing()):
        return backend.forward(plan, tensors)
    # The compiler cannot trace the query for dispatch modes.
    if is_graph or (
        not backend.is_dispatched and torch._C._len_torch_dispatch_stack() and not is_transformed()
        and compiled_ops.refuse(plan, tensors) is None
    ):  # fmt: skip
        return compiled_ops.run(name, plan, tensors)
    return autograd.run(backend, plan, tensors)


def masks_nonfinite(name: str | None, q: Any) -> bool:
    """Whether the backend of this name, or one that is tried on the device of q, masks nonfinite values itself."""
    if isinstance(name, str) and name in BACKENDS and BACKENDS[name].masks_nonfinite:
        return True
    return isinstance(q, Tensor) and q.device.type in _DEVICES_WITHOUT_FLAGS


_DEVICES_WITHOUT_FLAGS = frozenset(
    device for device in ("cpu", "cuda") if any(b.masks_nonfinite and b.is_for(device) for b in BACKENDS.values())
)


def _order(q: Tensor, is_eager: bool) -> list[str]:
    """Return the backends to try, in order."""
    # torch.compile warns of caches.
    return (_cached_order if is_eager else _find_order)(q.device.type, q.dtype)


def _find_order(device_type: str, dtype: torch.dtype) -> list[str]:
    names = [name for name, backend in BACKENDS.items() if backend.is_for(device_type) and backend.is_automatic]
    return sorted(names, key=lambda name: dtype not in BACKENDS[name].is_fastest_for)


_cached_order = derived(_find_order)


def run_plain(q: Tensor, k: Tensor, v: Tensor, summary: Summary | None) -> Sequence[Tensor] | None:
    """Return the outputs of a call with q, k, v and a summary alone, by one operator; None where it is not served. Not for
    calls that torch.compile traces.

    For a short sequence, assembling a problem takes longer than computing it.
    """
    if not (type(q) is type(k) is type(v) is Tensor) or _is_observed(q, k, v):
        return None
    name, plain = PLAIN
    outputs = plain(q, k, v, summary)
    if not outputs:
        return None
    ran = _ran.get()
    if ran is not None:
        ran.append(name)
    return outputs


def _is_observed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call is recorded or differentiated."""
    return torch._C._is_tracing() or autograd.is_differentiated((q, k, v))


def _choose(problem: Problem) -> str:
    for name in _order(problem.tensors[0], problem.is_eager):
        if _refuse(name, problem) is None:
            return name
    return LAST_RESORT


def _refuse(name: str, problem: Problem) -> str | None:
    """Return why a backend cannot serve a problem, None if it can."""
    backend, tensors, reason = BACKENDS[name], problem.tensors, None
    if problem.is_eager:
        supported = _refuse_components(name, problem.plan)
    else:
        reason = _refuse_observed(name, problem)
        supported = None if backend.supported is None else backend.supported.refuse(problem.plan)
    return reason or backend.refuse(problem.plan, tensors) or supported


@derived
def _refuse_components(name: str, plan: Plan) -> str | None:
    supported = BACKENDS[name].supported
    return None if supported is None else supported.refuse(plan)


def _refuse_observed(name: str, problem: Problem) -> str | None:
    """Return why a backend cannot serve a call that is recorded or transformed."""
    backend, tensors = BACKENDS[name], problem.tensors
    if not backend.has_all_derivatives and is_forward_mode(tensors):
        return f"forward-mode derivatives are taken, which only backend={LAST_RESORT!r} has"
    if not backend.is_differentiable and is_tracing():
        return "torch.jit and ONNX record operators of torch only"
    if not backend.is_differentiable and is_symbolic(*tensors[:3]):
        return compiled_ops.refuse(problem.plan, tensors)
    return None


def _force(problem: Problem, name: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        expected = f"one of {', '.join(map(repr, BACKENDS))}, or None"
        raise check.error("backend", name, expected, isinstance(name, str))
    reason = _refuse(name, problem)
    if reason is not None:
        raise ValueError(f"backend is {name!r}, which cannot serve this problem: {reason}")
    return name


@dataclass(frozen=True)
class Explanation:
    """Why each backend cannot serve a problem, in the order of preference; None if it can. `print` shows a table."""

    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = []
        for name, reason in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            automatic = "can serve" if BACKENDS[name].is_automatic else "can serve, when asked for by name"
            lines.append(f"{mark} {name:<10} {'no: ' + reason if reason else automatic}")
        return "\n".join(lines)


def explanation(problem: Problem) -> Explanation:
    """Return which backend would serve a problem, and why each of the others would not."""
    reasons = {name: _refuse(name, problem) for name in BACKENDS}
    return Explanation(_choose(problem), reasons)


@contextmanager
def record_backends() -> Iterator[list[str]]:
    """Record the names of the backends that run in the block, in order, in this thread.

    >>> with regard.record_backends() as ran:
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
