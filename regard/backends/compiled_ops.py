"""The operators that compiled and exported graphs hold: `regard::forward` and `regard::backward`.

They take a plan as text, and no sizes: a graph is not compiled again for another length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from regard.backends import functions
from regard.backends.autograd import scatter, to_save
from regard.backends.backend import FusedBackend
from regard.backends.plan_text import from_text, has_no_text, to_text
from regard.backends.registry import BACKENDS
from regard.components.component import fill
from regard.components.tensor_ops import widen
from regard.plan.problem import Plan, empty_outputs, sizes


def run(backend: str, plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return all outputs of a problem, in the order of `Plan.outputs`, by an operator in the graph that is being traced."""
    without, found = functions.take(plan, tensors)
    outputs = (
        functions.run(backend, without, tensors, found) if found else _forward(list(tensors), backend, *to_text(plan))
    )
    return tuple(outputs)[: len(outputs) - BACKENDS[backend].saved]


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why an operator cannot hold this plan, None if it can.

    The compiler guards what it traces through: the code of a Python function, and everything that it closes over. An
    operator that named the function would be reused with the function of an earlier call.
    """
    if torch.compiler.is_compiling():
        plan, _ = functions.take(plan, tensors)
    name = has_no_text(plan)
    return None if name is None else f"{name} cannot be an operand of an operator in a compiled graph"


@contextmanager
def _autograd_enabled() -> Iterator[None]:
    """Let an operator build graphs of its own: torch disables autograd inside of operators."""
    C = torch._C
    excluded = C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(C.DispatchKey, key))
    with C._ForceDispatchKeyGuard(C._dispatch_tls_local_include_set(), excluded):
        yield


def _fused(backend: str) -> FusedBackend:
    return cast(FusedBackend, BACKENDS[backend])


@torch.library.custom_op("regard::forward", mutates_args=())
def _forward(tensors: list[Tensor], backend: str, plan: str, ints: list[int], floats: list[float]) -> list[Tensor]:
    with _autograd_enabled():
        return [x.contiguous() for x in BACKENDS[backend].forward(from_text(plan, ints, floats), tensors)]


@_forward.register_fake
def _(tensors: list[Tensor], backend: str, plan: str, ints: list[int], floats: list[float]) -> list[Tensor]:
    parsed = from_text(plan, ints, floats)
    q, k, v = tensors[:3]
    like = widen(q)
    outputs = empty_outputs(fill(parsed, tensors), like, k, v)
    return [*outputs, *_fused(backend).empty_saved(sizes(q, k), like, v)]


@torch.library.custom_op("regard::backward", mutates_args=())
def _backward(
    gradients: list[Tensor], tensors: list[Tensor], saved: list[Tensor], backend: str, plan: str, ints: list[int],
    floats: list[float], is_given: list[bool], needs_grad: list[bool],
) -> list[Tensor]:  # fmt: skip
    with _autograd_enabled():
        scattered = scatter(gradients, is_given)
        results = _fused(backend).backward(from_text(plan, ints, floats), tensors, saved, scattered, needs_grad)
    return [x.contiguous() for x in results if x is not None]


@_backward.register_fake
def _(
    gradients: list[Tensor], tensors: list[Tensor], saved: list[Tensor], backend: str, plan: str, ints: list[int],
    floats: list[float], is_given: list[bool], needs_grad: list[bool],
) -> list[Tensor]:  # fmt: skip
    some = [x for x, needed in zip(tensors, needs_grad, strict=True) if needed]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in some]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.rest = inputs
    ctx.save_for_backward(*tensors, *to_save(_fused(ctx.rest[0]), output))
    ctx.needs_grad = [x.is_floating_point() for x in tensors]


def _autograd_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    gradients = gradients[: len(gradients) - BACKENDS[ctx.rest[0]].saved]
    is_given = [g is not None for g in gradients]
    present = [g for g in gradients if g is not None]
    tensors, saved = list(ctx.saved_tensors[: len(ctx.needs_grad)]), list(ctx.saved_tensors[len(ctx.needs_grad) :])
    results = _backward(present, tensors, saved, *ctx.rest, is_given, ctx.needs_grad)
    return list(scatter(results, ctx.needs_grad)), None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
