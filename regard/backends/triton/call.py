"""A problem as the Triton kernels are told it, and how one of them is started."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from regard.backends.relative import relative_table
from regard.backends.triton import additive_score as additive
from regard.backends.triton import mask, tuning
from regard.backends.triton.args import Form, Matrix, Sizes, Table, Tiles, Told, Words
from regard.components.component import Slot, fill
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import ALiBi, TensorBias, alibi_slopes
from regard.components.score import Additive, Product
from regard.plan.problem import Plan, sizes

_LOG2E = 1.4426950408889634
_WHOLE = 1 << 32
# So many queries are few: tiles of them have room for other heads.
FEW = 16


class Call:
    """A problem, as the kernels are told it."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], kernel: str, last: bool = False) -> None:
        self.plan, self.tensors = plan, tensors
        self.q, self.k, self.v = (rows(x.detach()) for x in tensors[:3])
        self.size = sizes(self.q, self.k)
        self.device = self.q.device
        self.D, self.E = self.q.shape[-1], self.v.shape[-1]
        self.shape, self.repeats = self._shape(kernel)
        self.queries = self.shape.queries // self.repeats  # of a tile
        self._mask = None if plan.mask is None else fill(plan.mask, tensors)
        self._told = None if self._mask is None else mask.tell(self._mask, self.size)
        self.words = self._words()
        self.sizes = Sizes(self.size.H, self.size.G, self.size.L, self.size.S)
        self.form = self._form(last)

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles of queries there are, and how many of keys."""
        return -(-self.size.L // self.queries), -(-self.size.S // self.shape.keys)

    def told(self, turned: bool = False) -> Told:
        """What a kernel takes that goes along a row of tiles; `turned`, along a column."""
        return Told(self.words, self._tiles(turned), self.sizes, constants(self.form))

    def of(self, slot: Any) -> Any:
        """The tensor, or the number, that stands in a plan."""
        return self.tensors[slot.index].detach() if isinstance(slot, Slot) else slot

    def per_query(self, *width: int) -> Tensor:
        """An empty tensor (B, H, L, ...) in float32."""
        return self.empty(self.size.B, self.size.H, self.size.L, *width)

    def empty(self, *shape: int) -> Tensor:
        """An empty tensor in float32."""
        return self.q.new_empty(shape, dtype=torch.float32)

    def kinds(self) -> tuple[Tensor | None, int]:
        """Of each tile whether it is full, partial or empty, and 1 where each batch row has its own; None without a mask."""
        if self._mask is None:
            return None, 0
        kinds = mask.kinds(self._mask, self.size, self.queries, self.shape.keys, self.device).contiguous()
        return kinds, int(kinds.shape[0] > 1)

    def _shape(self, kernel: str) -> tuple[tuning.Shape, int]:
        """The tiles, and how many heads share one: those that share their keys do, where there are few queries."""
        width = max(wide(self.D), wide(self.E))
        repeats = self.size.H // self.size.G
        if isinstance(self.plan.score, Additive):
            kernel = f"additive {kernel}"
        elif kernel == "forward":
            kernel = "few" if self.size.L <= FEW else "top" if self.plan.summary.top else kernel
        elif kernel == "backward" and isinstance(self.plan.bias, TensorBias):
            kernel = "biased backward"
        shape = tuning.shape(kernel, self.q.dtype, width, self.device)
        packed = kernel == "few" and repeats & (repeats - 1) == 0 and repeats <= shape.queries
        return shape, repeats if packed else 1

    def _tiles(self, turned: bool) -> Tiles:
        if self._told is None:
            return Tiles(None, None, 0, 0, 0, (), ())
        assert self.plan.mask is not None
        order, counts = mask.lists(
            self.plan.mask, self.tensors, self.size, self.queries, self.shape.keys, self.device, turned
        )
        own = int(order.shape[0] > 1)
        return Tiles(order, counts, own, order.shape[1], order.shape[2], self._told.pointers, self._told.numbers)

    def _form(self, last: bool) -> Form:
        top = self.plan.summary.top
        terms = () if self._told is None else self._told.terms
        # Weights that are rounded to the precision of values do for the gradients of q, k and v in the same precision, but
        # not for those of parameters, some of which went into q and k.
        exact = not last and (self.q.dtype != self.v.dtype or any(x.is_floating_point() for x in self.tensors[3:]))
        return Form(
            self.D, self.E, wide(self.D), wide(self.E), self.shape.queries, self.shape.keys, self.repeats,
            isinstance(self.plan.normalizer, Sigmoid), top, _power_of_two(max(top, 1)), len(terms), terms, self._is_bare(),
            exact, tuning.is_interpreted(),
        )  # fmt: skip

    def _is_bare(self) -> bool:
        plan, words = self.plan, self.words
        beside = (plan.softcap, plan.bias, words.key_bias, words.query_bias, words.turned)
        return isinstance(plan.normalizer, Softmax) and words.scale > 0 and all(word is None for word in beside)

    def _words(self) -> Words:
        plan, size = self.plan, self.size
        score, normalizer, bias = plan.score, plan.normalizer, plan.bias
        words = Words(*[None] * len(Words._fields))._replace(scale=_LOG2E, offset=0, dropped=0, kept=1.0)
        if isinstance(score, Additive):
            words = words._replace(
                turned=additive.turn(self.q, self.k, self.of(score.v), self.shape.queries, self.shape.keys)
            )
        elif isinstance(score, Product):
            scale = self.D**-0.5 if score.scale is None else score.scale
            key_bias, query_bias = (_scaled(self.of(x)) for x in (score.key_bias, score.query_bias))
            words = words._replace(scale=scale * _LOG2E, key_bias=key_bias, query_bias=query_bias)
        if plan.softcap is not None:
            words = words._replace(softcap=plan.softcap * _LOG2E)
        if isinstance(bias, TensorBias):
            tensor = self.of(bias.tensor)
            strides = [stride if n > 1 else 0 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)]
            words = words._replace(bias=Table(tensor, *strides))
        elif isinstance(bias, ALiBi):
            slopes = self.of(bias.slopes)
            slopes = _slopes(size.H, self.device) if slopes is None else slopes
            words = words._replace(slopes=_scaled(slopes), offset=size.offset(bias.align))
        elif bias is not None:
            words = words._replace(relative=_scaled(relative_table(bias, size, torch.float32, self.tensors)))
        level = self.of(level_of(normalizer))
        if level is not None and not (isinstance(normalizer, Sigmoid) and not isinstance(level, Tensor) and level == 0):
            level = level if isinstance(level, Tensor) else torch.full((), level, device=self.device)
            words = words._replace(level=_scaled(level.expand(size.H)))
        if plan.nonfinite_q is not None:
            words = words._replace(
                nonfinite_q=_bytes(self.of(plan.nonfinite_q)), nonfinite_k=_bytes(self.of(plan.nonfinite_k))
            )
        if plan.dropout:
            dropped = min(round(plan.dropout * _WHOLE), _WHOLE - 1)
            kept = 1 / (1 - plan.dropout) if plan.dropout < 1 else 0.0
            words = words._replace(seed=self.of(plan.seed), dropped=dropped, kept=kept)
        return words


@lru_cache(64)
def _slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's own, on the device since the first call: from the CPU, every call would wait for them."""
    return torch.tensor(alibi_slopes(heads), device=device)


def level_of(normalizer: Any) -> Any:
    """The sink of a softmax, the bias of a sigmoid, as they stand in a plan."""
    return normalizer.sink if isinstance(normalizer, Softmax) else normalizer.bias


@lru_cache(1024)
def constants(form: Form) -> Form:
    """What a kernel is compiled for, as constants."""
    return Form(*[tl.constexpr(x) for x in form])


def matrix(x: Tensor) -> Matrix:
    """A tensor (B, H, rows, width) for the kernels."""
    return Matrix(x, *x.stride()[:3])


def start(kernel: Any, grid: tuple[int, ...], shape: tuning.Shape, *arguments: Any) -> None:
    """Start a kernel on a grid of programs."""
    kernel[grid](*arguments, num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True)


def rows(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def wide(width: int) -> int:
    """A width, filled up to what a product takes."""
    return max(_power_of_two(width), 16)


def _power_of_two(n: int) -> int:
    """The least that is not below n. Triton's own takes ten times as long, as it is for kernels, too."""
    return 1 << (n - 1).bit_length()


def _scaled(x: Tensor | None) -> Tensor | None:
    return None if x is None else (x.float() * _LOG2E).contiguous()


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)
