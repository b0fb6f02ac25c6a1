"""Fused backends as part of autograd and torch.func.

Their second derivatives are those of `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from regard.backends import reference
from regard.backends.backend import Backend, FusedBackend
from regard.components.function import captured_slots
from regard.plan.nonfinite import flag_nonfinite
from regard.plan.problem import Plan
from regard.tracing import is_batched, is_transformed


def run(backend: Backend, plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return all outputs of a problem, in the order of `Plan.outputs`, with gradients."""
    outputs: tuple[Tensor, ...]
    if is_transformed():
        outputs = Forward.apply(_as_fused(backend), plan, *tensors)  # type: ignore[no-untyped-call]
    elif _is_recorded(tensors):
        function = Once if backend.is_differentiable else Eager
        return function.apply(backend, plan, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    else:
        outputs = backend.forward(plan, tensors, is_last=True)
    return outputs[: len(outputs) - backend.saved]


def is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd or a transform of torch.func has to see the call. If not, a short call takes half of the time."""
    return _is_recorded(tensors) or is_transformed()


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # noqa: C419, a generator takes longer


class _ByAutograd:
    """A backend of differentiable operations, with a backward pass: autograd differentiates the operations once."""

    saved = 0

    def __init__(self, backend: Backend) -> None:
        self.masks_nonfinite, self.forward = backend.masks_nonfinite, backend.forward

    def backward(
        self,
        plan: Plan,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """See `FusedBackend.backward`."""
        leaves = _leaves(tensors, needs_grad)
        with torch.enable_grad():
            outputs = self.forward(plan, leaves)
        return _differentiate(outputs, leaves, gradients, needs_grad)


def _as_fused(backend: Backend) -> FusedBackend:
    return cast(FusedBackend, _ByAutograd(backend) if backend.is_differentiable else backend)


def _leaves(tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Return the tensors as leaves of a new graph."""
    return [x.detach().requires_grad_(needed) for x, needed in zip(tensors, needs_grad, strict=True)]


def _differentiate(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    keep: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of leaves. `keep` says whether the graph may be differentiated again."""
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
    if not pairs or not any(needs_grad):
        return (None,) * len(leaves)
    found = torch.autograd.grad(
        [x for x, _ in pairs], [x for x, needed in zip(leaves, needs_grad, strict=True) if needed],
        [g for _, g in pairs], retain_graph=keep, allow_unused=True,
    )  # fmt: skip
    return scatter(found, needs_grad)


def to_save(backend: FusedBackend, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what `backward` takes of everything that `forward` returned."""
    return (outputs[0], *outputs[-backend.saved :]) if backend.saved else ()


class Forward(torch.autograd.Function):
    """The forward pass of a backend."""

    @staticmethod
    def forward(backend: FusedBackend, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = backend.forward(plan, tensors)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.plan, *tensors = inputs
        saved = to_save(ctx.backend, output)
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output if not x.is_floating_point()], *saved[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_of(ctx, gradients[: len(gradients) - ctx.backend.saved])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _loop_over_batch(Forward.apply, info.batch_size, in_dims, inputs)


class Eager(torch.autograd.Function):
    """The same for calls outside of transforms. These need `setup_context`; for a Function with one, torch looks up its
    signature in every call, which takes longer than computing a short sequence.
    """

    @staticmethod
    def forward(ctx: Any, backend: FusedBackend, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backend, ctx.plan = backend, plan
        outputs: tuple[Tensor, ...] = backend.forward(plan, tensors)
        ctx.save_for_backward(*tensors, *to_save(backend, outputs))
        ctx.set_materialize_grads(False)
        outputs = outputs[: len(outputs) - backend.saved]
        if plan.summary.top:
            ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_of(ctx, gradients)


class Once(torch.autograd.Function):
    """The same for a backend of differentiable operations that can be differentiated once.

    Their graph is built in the forward pass, and kept; second derivatives are those of `reference`.
    """

    @staticmethod
    def forward(ctx: Any, backend: Backend, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backend, ctx.plan = _as_fused(backend), plan
        ctx.leaves = _leaves(tensors, ctx.needs_input_grad[2:])
        with torch.enable_grad():
            ctx.outputs = backend.forward(plan, ctx.leaves)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in gradients):
            return _backward_of(ctx, gradients)
        _ = ctx.saved_tensors  # raises if the graph was freed, or a tensor modified
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return None, None, *_differentiate(ctx.outputs, ctx.leaves, gradients, ctx.needs_input_grad[2:], keep)


def _backward_of(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs of a forward pass, from those of its outputs."""
    if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients):
        return _for_each_of_batch(lambda *some: _backward_of(ctx, some), gradients)
    needs_grad, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
    if not torch.is_grad_enabled() and not is_transformed():
        # No second derivative and no vmap of the first: no graph is needed.
        tensors, saved = saved[: len(needs_grad)], saved[len(needs_grad) :]
        return None, None, *ctx.backend.backward(ctx.plan, tensors, saved, gradients, needs_grad)
    given = tuple(g is not None for g in gradients)
    present = [g for g in gradients if g is not None]
    results = Backward.apply(ctx.backend, ctx.plan, needs_grad, given, *present, *saved)  # type: ignore[no-untyped-call]
    return None, None, *scatter(results, needs_grad)


class Backward(torch.autograd.Function):
    """The backward pass of a backend. Its derivative is that of `reference`."""

    @staticmethod
    def forward(
        backend: FusedBackend, plan: Plan, needs_grad: tuple[bool, ...], given: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        gradients, rest = tensors[: sum(given)], tensors[sum(given) :]
        tensors, outputs = rest[: len(needs_grad)], rest[len(needs_grad) :]
        results = backend.backward(plan, tensors, outputs, scatter(gradients, given), needs_grad)
        return tuple(x for x in results if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.plan, ctx.needs_grad, ctx.given, *tensors = inputs
        # The saved tensors are functions of the inputs: the second derivative is taken of the inputs alone.
        ctx.save_for_backward(*tensors[: sum(ctx.given) + len(ctx.needs_grad)])
        ctx.count = len(tensors)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
        if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in seconds):
            return _for_each_of_batch(lambda *some: Backward.backward(ctx, *some), seconds)
        first, needed = sum(ctx.given), ctx.needs_input_grad[4:]
        captured = captured_slots(ctx.plan.score, ctx.plan.bias)
        own = [first + i for i in captured if ctx.needs_grad[i] or needed[first + i]]
        results = _second(ctx, seconds) if not own else _second_of_function(ctx, seconds, own)
        return None, None, None, None, *[results.get(i) for i in range(ctx.count)]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _loop_over_batch(Backward.apply, info.batch_size, in_dims, inputs)


def _equation(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what `reference` gives for the same problem."""
    plan, tensors = flag_nonfinite(ctx.plan, tensors) if ctx.backend.masks_nonfinite else (ctx.plan, tensors)
    return reference.forward(plan, tensors)


def _second(ctx: Any, seconds: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the derivative of `Backward`, by the index of its tensors."""
    count, needs_grad = sum(ctx.given), ctx.needs_grad
    moving = [i for i, x in enumerate(ctx.saved_tensors) if x.is_floating_point()]

    def first(*floats: Tensor) -> tuple[Tensor, ...]:
        """The first derivative as a differentiable function of gradients and tensors."""
        everything = list(ctx.saved_tensors)
        for i, x in zip(moving, floats, strict=True):
            everything[i] = x
        gradients, tensors = everything[:count], everything[count:]

        def equation(*some: Tensor) -> tuple[Tensor, ...]:
            outputs = _equation(ctx, _replace(tensors, needs_grad, some))
            return tuple(x for x, flag in zip(outputs, ctx.given, strict=True) if flag)

        vjp = torch.func.vjp(equation, *[x for x, needed in zip(tensors, needs_grad, strict=True) if needed])[1]
        return tuple(vjp(tuple(gradients)))

    vjp = torch.func.vjp(first, *[ctx.saved_tensors[i] for i in moving])[1]
    return dict(zip(moving, vjp(tuple(seconds)), strict=True))


def _second_of_function(ctx: Any, seconds: Sequence[Tensor], own: Sequence[int]) -> dict[int, Tensor]:
    """The same for a Python score that closes over tensors, `own`, that need a gradient. The score computes with these
    whatever its arguments are, so torch.func cannot replace them: the graph that they are leaves of is differentiated.
    """
    count, saved = sum(ctx.given), ctx.saved_tensors
    moving = [i for i, x in enumerate(saved) if x.is_floating_point()]
    leaves = [x if i in own else x.detach().requires_grad_(i in moving) for i, x in enumerate(saved)]
    with torch.enable_grad():
        outputs = _equation(ctx, leaves[count:])
        firsts = torch.autograd.grad(
            [x for x, flag in zip(outputs, ctx.given, strict=True) if flag],
            [x for x, needed in zip(leaves[count:], ctx.needs_grad, strict=True) if needed],
            leaves[:count], create_graph=True, materialize_grads=True,
        )  # fmt: skip
    pairs = [(x, y) for x, y in zip(firsts, seconds, strict=True) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in pairs], [leaves[i] for i in moving], [y for _, y in pairs], retain_graph=True, allow_unused=True
    )
    return dict(zip(moving, found, strict=True))


def _for_each_of_batch(
    function: Callable[..., tuple[Tensor | None, ...]], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Apply a function to each element of batched gradients: `torch.autograd.grad(is_grads_batched=True)` and vectorized
    Jacobians pass these, with a hidden axis, to a backward pass.
    """
    is_hidden = [g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients]
    level = _level(next(g for g, hidden in zip(gradients, is_hidden, strict=True) if g is not None and hidden))
    stacks = [
        torch._remove_batch_dim(g, level, 1, 0) if hidden else g  # type: ignore[arg-type]
        for g, hidden in zip(gradients, is_hidden, strict=True)
    ]
    count = next(len(g) for g, hidden in zip(stacks, is_hidden, strict=True) if g is not None and hidden)
    runs = [
        function(*[g[i] if g is not None and hidden else g for g, hidden in zip(stacks, is_hidden, strict=True)])
        for i in range(count)
    ]
    return tuple(
        None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
        for parts in zip(*runs, strict=True)
    )


def _level(x: Tensor) -> int:
    """Return the level of the hidden axis of a batched gradient."""
    levels = (
        n for n in range(1, 65) if not torch._C._functorch.is_legacy_batchedtensor(torch._remove_batch_dim(x, n, 1, 0))
    )
    return next(levels)


def _loop_over_batch(
    apply: Callable[..., tuple[Tensor, ...]], count: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a Function to each element of a batch axis of torch.func.vmap, and stack the results."""
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


def scatter(present: Sequence[Tensor], flags: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the tensors with None inserted where a flag is False."""
    items = iter(present)
    return tuple(next(items) if flag else None for flag in flags)


def _replace(tensors: Sequence[Tensor], needs_grad: Sequence[bool], some: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with those that need a gradient replaced."""
    items = iter(some)
    return [next(items) if needed else x for x, needed in zip(tensors, needs_grad, strict=True)]
