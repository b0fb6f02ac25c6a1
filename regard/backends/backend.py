"""What a backend is: the contract between `attention` and an implementation of its problems.

A backend is a module, or an object, with the attributes and functions of `Backend`, and one line in the table of `registry`.
Nothing outside its own folder and that line knows its name. It keeps the contract of CONTRIBUTING.md, and refuses what it
cannot do.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from regard.components.normalizer import Normalizer
from regard.components.position import Bias
from regard.components.predicate import Mask, leaves
from regard.components.score import Score
from regard.components.statistic import Statistic
from regard.components.tile import Sizes
from regard.plan.problem import Plan


class Supported(NamedTuple):
    """The classes of components that a backend computes itself. A subclass of one of them may compute something else, so it
    is not included.

    Scores are those of plans, after `Score.reduce`. Masks are those that `&`, `|` and `~` combine.
    """

    scores: Container[type[Score]]
    normalizers: Container[type[Normalizer]]
    masks: Container[type[Mask]]
    biases: Container[type[Bias]]
    statistics: Container[type[Statistic]]

    def refuse(self, plan: Plan) -> str | None:
        """Return which component of a plan is not supported; None if all are."""
        components: tuple[tuple[str, Sequence[Any], Container[type]], ...] = (
            ("score", (plan.score,), self.scores),
            ("normalizer", (plan.normalizer,), self.normalizers),
            ("bias", () if plan.bias is None else (plan.bias,), self.biases),
            ("summary", plan.summary.statistics, self.statistics),
            ("mask", leaves(plan.mask), self.masks),
        )
        for kind, parts, classes in components:
            for part in parts:
                if type(part) not in classes:
                    what = part.name if isinstance(part, Statistic) else type(part).__name__
                    return f"it does not support the {kind} {what}"
        return None


class Backend(Protocol):
    """An implementation of problems."""

    @property
    def about(self) -> str:
        """What it is, in a few words."""

    @property
    def is_automatic(self) -> bool:
        """Whether it may be chosen without being named."""

    @property
    def is_fastest_for(self) -> Container[torch.dtype]:
        """The dtypes of q for which it comes before all others."""

    @property
    def masks_nonfinite(self) -> bool:
        """Whether it masks NaN and inf in q, k and v itself. For the others, problems carry flags: see `plan.nonfinite`."""

    @property
    def supported(self) -> Supported | None:
        """Which components it computes; None for all of them."""

    @property
    def is_differentiable(self) -> bool:
        """Whether `forward` is made of differentiable operations of PyTorch: then there is no `backward`."""

    @property
    def has_all_derivatives(self) -> bool:
        """Whether these operations have derivatives of every order and direction. Of other backends, autograd gives first
        derivatives; the second ones are those of `reference`."""

    @property
    def is_dispatched(self) -> bool:
        """Whether it computes by operators of torch, which dispatch modes such as `FlopCounterMode` see. For the others, one
        operator stands in while such a mode is active: see `backends.compiled_ops`."""

    @property
    def saved(self) -> int:
        """How many tensors `forward` returns after the outputs, for `backward` to take."""

    def is_for(self, device_type: str) -> bool:
        """Whether it is tried for tensors on such a device, "cpu" or "cuda", without being named."""

    def refuse(self, plan: Plan, tensors: Sequence[Tensor]) -> str | None:
        """Return why it cannot serve a problem of supported components, None if it can."""

    def forward(self, plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `Plan.outputs`, then the saved tensors.

        Saved tensors may be empty if `is_last`: no backward pass follows.
        """


class FusedBackend(Backend, Protocol):
    """A backend with a backward pass of its own."""

    def backward(
        self,
        plan: Plan,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors that need one, None for the others.

        Args:
            plan, tensors: the problem.
            saved: the output and the saved tensors of `forward`; nothing where it saves none.
            gradients: of the outputs. None stands for zeros.
            needs_grad: one bool per tensor.
        """

    def empty_saved(self, size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
        """Return uninitialized tensors with the shapes and dtypes of the saved ones; `like` is in accumulation precision."""
