"""Kernels with a forward and a backward of their own, made part of autograd, torch.func and torch.compile.

Eager calls go through `torch.autograd.Function`, which is cheap. Compiled and exported graphs hold one operator,
`regard::forward`, whose plan is text, and which does not care how long the sequences are: no compilation per length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard import mask, normalizer, position, problem, score, summary, word
from regard.function import Python
from regard.kernels import cpu, reference, tiled
from regard.kernels.gpu import serve as gpu
from regard.problem import Plan

# Each gives, after its outputs, EXTRAS tensors that its backward pass takes together with the first of them.
_KERNELS: dict[str, ModuleType] = {"cpu": cpu, "gpu": gpu, "tiled": tiled, "reference": reference}

_VOCABULARY: dict[str, type[Any]] = {
    name: kind
    for module in (score, normalizer, mask, position, summary, problem, word)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
}


def run(kernel: str, plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs of a problem by a kernel, in the order of `Plan.outputs`, with gradients."""
    compiling = torch.compiler.is_compiling()
    if kernel == "reference" and not (compiling and word.unwritable(plan, _VOCABULARY) is None):
        return reference.run(plan, tensors)  # it is made of differentiable steps
    if compiling:
        numbers = word.Numbers()
        text = word.describe(plan, numbers)
        outputs = tuple(_forward(list(tensors), kernel, text, numbers.whole, numbers.real))
    elif _is_transformed():
        outputs = Forward.apply(kernel, plan, *tensors)  # type: ignore[no-untyped-call]
    elif _is_recorded(tensors):
        return Eager.apply(kernel, plan, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    elif _KERNELS[kernel].EXTRAS:
        outputs = _KERNELS[kernel].forward(plan, tensors, last=True)
    else:
        outputs = _KERNELS[kernel].forward(plan, tensors)
    return outputs[: len(outputs) - _KERNELS[kernel].EXTRAS]


def refuse_compiled(plan: Plan) -> str | None:
    """Why the graph that is being compiled cannot hold an operator with this plan; None if it can, or none is compiled.

    The compiler guards what it traces through: the code of a Python function, and all that it closes over. An operator that
    named the function would be reused with the function of an earlier call.
    """
    name = word.unwritable(plan, _VOCABULARY) if torch.compiler.is_compiling() else None
    return None if name is None else f"{name} cannot be an operand of an operator in a compiled graph"


def is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Does autograd or a transform of torch.func have to know? If not, half of the time of a short call is saved."""
    return _is_recorded(tensors) or _is_transformed()


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # noqa: C419, a generator takes longer


def _is_transformed() -> bool:
    """Is a transform of torch.func, or forward mode, under way?"""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _kept(kernel: str, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a kernel's backward pass takes of all that its forward pass gave."""
    extras = _KERNELS[kernel].EXTRAS
    return (outputs[0], *outputs[-extras:]) if extras else ()


class Forward(torch.autograd.Function):
    """A kernel's forward."""

    @staticmethod
    def forward(kernel: str, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _KERNELS[kernel].forward(plan, tensors)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, ctx.plan, *tensors = inputs
        kept = _kept(ctx.kernel, output)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output if not x.is_floating_point()], *kept[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_of(ctx, gradients[: len(gradients) - _KERNELS[ctx.kernel].EXTRAS])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(Forward.apply, info.batch_size, in_dims, inputs)


class Eager(torch.autograd.Function):
    """The same for calls that no transform sees. Those want the context apart from `forward`; in a Function of that form
    torch looks up its signature in every call, which takes longer than a short sequence takes to compute.
    """

    @staticmethod
    def forward(ctx: Any, kernel: str, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kernel, ctx.plan = kernel, plan
        outputs: tuple[Tensor, ...] = _KERNELS[kernel].forward(plan, tensors)
        ctx.save_for_backward(*tensors, *_kept(kernel, outputs))
        ctx.set_materialize_grads(False)
        outputs = outputs[: len(outputs) - _KERNELS[kernel].EXTRAS]
        if plan.summary.top:
            ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_of(ctx, gradients)


def _backward_of(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of a kernel's forward, from those of its outputs."""
    wanted, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
    if not torch.is_grad_enabled() and not _is_transformed():
        # Nobody asks for a second derivative, nor maps the first: no graph has to know of it.
        tensors, kept = saved[: len(wanted)], saved[len(wanted) :]
        return None, None, *_KERNELS[ctx.kernel].backward(ctx.plan, tensors, kept, gradients, wanted)
    given = tuple(g is not None for g in gradients)
    present = [g for g in gradients if g is not None]
    results = Backward.apply(ctx.kernel, ctx.plan, wanted, given, *present, *saved)  # type: ignore[no-untyped-call]
    return None, None, *_spread(results, wanted)


class Backward(torch.autograd.Function):
    """A kernel's backward. Its own derivative is taken by `reference`."""

    @staticmethod
    def forward(
        kernel: str, plan: Plan, wanted: tuple[bool, ...], given: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        gradients, rest = tensors[: sum(given)], tensors[sum(given) :]
        tensors, outputs = rest[: len(wanted)], rest[len(wanted) :]
        results = _KERNELS[kernel].backward(plan, tensors, outputs, _spread(gradients, given), wanted)
        return tuple(x for x in results if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, ctx.plan, ctx.wanted, ctx.given, *tensors = inputs
        # What the forward pass kept follows from the tensors: the second derivative is taken of them alone.
        ctx.save_for_backward(*tensors[: sum(ctx.given) + len(ctx.wanted)])
        ctx.count = len(tensors)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
        first, needed = sum(ctx.given), ctx.needs_input_grad[4:]
        captured = word.slots(ctx.plan.score.captured) if isinstance(ctx.plan.score, Python) else []
        own = [first + i for i in captured if ctx.wanted[i] or needed[first + i]]
        results = _second(ctx, seconds) if not own else _second_of_function(ctx, seconds, own)
        return None, None, None, None, *[results.get(i) for i in range(ctx.count)]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(Backward.apply, info.batch_size, in_dims, inputs)


def _equation(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `reference` gives for a problem of another kernel; that of the GPU was left to keep NaN from leaking."""
    plan, tensors = problem.flagged(ctx.plan, tensors) if ctx.kernel == "gpu" else (ctx.plan, tensors)
    return reference.run(plan, tensors)


def _second(ctx: Any, seconds: Sequence[Tensor]) -> dict[int, Tensor]:
    """The derivative of `Backward`, by the index of its tensors."""
    count, wanted = sum(ctx.given), ctx.wanted
    moving = [i for i, x in enumerate(ctx.saved_tensors) if x.is_floating_point()]

    def first(*floats: Tensor) -> tuple[Tensor, ...]:
        """The first derivative, as a differentiable function of gradients and tensors."""
        everything = list(ctx.saved_tensors)
        for i, x in zip(moving, floats, strict=True):
            everything[i] = x
        gradients, tensors = everything[:count], everything[count:]

        def equation(*some: Tensor) -> tuple[Tensor, ...]:
            outputs = _equation(ctx, _merge(tensors, wanted, some))
            return tuple(x for x, there in zip(outputs, ctx.given, strict=True) if there)

        pull = torch.func.vjp(equation, *[x for x, want in zip(tensors, wanted, strict=True) if want])[1]
        return tuple(pull(tuple(gradients)))

    pull = torch.func.vjp(first, *[ctx.saved_tensors[i] for i in moving])[1]
    return dict(zip(moving, pull(tuple(seconds)), strict=True))


def _second_of_function(ctx: Any, seconds: Sequence[Tensor], own: Sequence[int]) -> dict[int, Tensor]:
    """The same for a Python score whose `own` tensors want a gradient. It computes with them whatever it is given, so that
    no function of other tensors can be differentiated in its place: only the graph that they are leaves of.
    """
    count, saved = sum(ctx.given), ctx.saved_tensors
    moving = [i for i, x in enumerate(saved) if x.is_floating_point()]
    leaves = [x if i in own else x.detach().requires_grad_(i in moving) for i, x in enumerate(saved)]
    with torch.enable_grad():
        outputs = _equation(ctx, leaves[count:])
        firsts = torch.autograd.grad(
            [x for x, there in zip(outputs, ctx.given, strict=True) if there],
            [x for x, want in zip(leaves[count:], ctx.wanted, strict=True) if want],
            leaves[:count], create_graph=True, materialize_grads=True,
        )  # fmt: skip
    pairs = [(x, y) for x, y in zip(firsts, seconds, strict=True) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in pairs], [leaves[i] for i in moving], [y for _, y in pairs], retain_graph=True, allow_unused=True
    )
    return dict(zip(moving, found, strict=True))


def _one_by_one(
    apply: Callable[..., tuple[Tensor, ...]], count: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a Function gives for each element of a batch axis of torch.func.vmap, stacked."""
    runs = [
        apply(
            *[
                x if dim is None or not isinstance(x, Tensor) else x.select(dim, i)
                for x, dim in zip(inputs, in_dims, strict=True)
            ]
        )
        for i in range(count)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
    return outputs, (0,) * len(outputs)


def _spread(present: Sequence[Tensor], there: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The tensors that are present, with None in the places where none is."""
    items = iter(present)
    return tuple(next(items) if flag else None for flag in there)


def _merge(tensors: Sequence[Tensor], wanted: Sequence[bool], some: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with those that are wanted replaced."""
    items = iter(some)
    return [next(items) if want else x for x, want in zip(tensors, wanted, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The operators that compiled graphs hold.


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Let an operator build graphs of its own: torch switches autograd off inside of operators."""
    C = torch._C
    excluded = C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(C.DispatchKey, key))
    with C._ForceDispatchKeyGuard(C._dispatch_tls_local_include_set(), excluded):
        yield


def _plan(text: str, whole: list[int], real: list[float]) -> Plan:
    plan: Plan = word.parse(text, word.Numbers(whole, real), _VOCABULARY)
    return plan


@torch.library.custom_op("regard::forward", mutates_args=())
def _forward(tensors: list[Tensor], kernel: str, plan: str, whole: list[int], real: list[float]) -> list[Tensor]:
    with _autograd_inside():
        return [x.contiguous() for x in _KERNELS[kernel].forward(_plan(plan, whole, real), tensors)]


@_forward.register_fake
def _(tensors: list[Tensor], kernel: str, plan: str, whole: list[int], real: list[float]) -> list[Tensor]:
    parsed = _plan(plan, whole, real)
    q, k, v = tensors[:3]
    size = problem.sizes(q, k)
    like = score.widen(q)
    outputs = tiled.empty_outputs(word.fill(parsed, tensors), parsed.outputs, size, like, v, v.dtype)
    extras = _KERNELS[kernel].empty_extras(size, like, v) if _KERNELS[kernel].EXTRAS else []
    return [*outputs, *extras]


@torch.library.custom_op("regard::backward", mutates_args=())
def _backward(
    gradients: list[Tensor], tensors: list[Tensor], outputs: list[Tensor], kernel: str, plan: str, whole: list[int],
    real: list[float], given: list[bool], wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    with _autograd_inside():
        spread = _spread(gradients, given)
        results = _KERNELS[kernel].backward(_plan(plan, whole, real), tensors, outputs, spread, wanted)
    return [x.contiguous() for x in results if x is not None]


@_backward.register_fake
def _(
    gradients: list[Tensor], tensors: list[Tensor], outputs: list[Tensor], kernel: str, plan: str, whole: list[int],
    real: list[float], given: list[bool], wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    some = [x for x, want in zip(tensors, wanted, strict=True) if want]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in some]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.rest = inputs
    ctx.save_for_backward(*tensors, *_kept(ctx.rest[0], output))
    ctx.wanted = [x.is_floating_point() for x in tensors]


def _compiled_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    gradients = gradients[: len(gradients) - _KERNELS[ctx.rest[0]].EXTRAS]
    given = [g is not None for g in gradients]
    present = [g for g in gradients if g is not None]
    tensors, outputs = list(ctx.saved_tensors[: len(ctx.wanted)]), list(ctx.saved_tensors[len(ctx.wanted) :])
    results = _backward(present, tensors, outputs, *ctx.rest, given, ctx.wanted)
    return list(_spread(results, ctx.wanted)), None, None, None, None


_forward.register_autograd(_compiled_backward, setup_context=_save)
