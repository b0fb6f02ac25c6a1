"""Packing a problem into the arguments of the Triton kernels, and launching them."""

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
from regard.backends.triton.args import (
    BroadcastTensor,
    KernelArgs,
    KernelConfig,
    KernelSizes,
    Matrix,
    ScoreArgs,
    TileLists,
)
from regard.components.component import Slot, fill
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import ALiBi, TensorBias, alibi_slopes
from regard.components.score import Additive, Product
from regard.plan.cache import derived
from regard.plan.problem import Plan, sizes

_LOG2E = 1.4426950408889634
_TWO_POW_32 = 1 << 32
_ORIGIN = ("first_batch", "first_head", "first_query", "first_key")
# Up to this many queries, a tile has room for several heads.
FEW_QUERIES = 16


class Call:
    """A problem with everything that its kernels take.

    Args:
        plan, tensors: the problem.
        kernel: "forward", "backward" or "bias_grad": see `tuning.launch_config`.
        is_last: whether no backward pass follows.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], kernel: str, is_last: bool = False) -> None:
        self.plan, self.tensors = plan, tensors
        self.q, self.k, self.v = (contiguous_rows(x.detach()) for x in tensors[:3])
        self.size = sizes(self.q, self.k)
        self.device = self.q.device
        self.D, self.E = self.q.shape[-1], self.v.shape[-1]
        self.launch_config, self.heads_per_tile = self._choose_launch_config(kernel)
        self.queries_per_tile = self.launch_config.queries // self.heads_per_tile
        self._mask = None if plan.mask is None else fill(plan.mask, tensors)
        self._encoded_mask = None if self._mask is None else mask.encode_mask(self._mask, self.size)
        self.score_args = self._make_score_args()
        self.sizes = KernelSizes(self.size.H, self.size.G, self.size.L, self.size.S)
        self.config = self._make_config(is_last)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of tiles of queries, and of tiles of keys."""
        return -(-self.size.L // self.queries_per_tile), -(-self.size.S // self.launch_config.keys)

    def kernel_args(self, transposed: bool = False) -> KernelArgs:
        """Return the arguments of a kernel that iterates along rows of tiles, or along columns if `transposed`."""
        return KernelArgs(self.score_args, self._list_tiles(transposed), self.sizes, as_constexpr(self.config))

    def value_of(self, field: Any) -> Any:
        """Return the tensor that a slot of the plan stands for; other values as they are."""
        return self.tensors[field.index].detach() if isinstance(field, Slot) else field

    def empty_per_query(self, *width: int) -> Tensor:
        """Return an uninitialized float32 tensor of shape (B, H, L, ...)."""
        return self.empty(self.size.B, self.size.H, self.size.L, *width)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized float32 tensor."""
        return self.q.new_empty(shape, dtype=torch.float32)

    def tile_kinds(self) -> tuple[Tensor | None, int]:
        """Return the kind of each tile, and 1 if each batch row has its own, else 0; (None, 0) without a mask."""
        if self._mask is None:
            return None, 0
        kinds = mask.classify_tiles(
            self._mask, self.size, self.queries_per_tile, self.launch_config.keys, self.device
        ).contiguous()
        return kinds, int(kinds.shape[0] > 1)

    def _choose_launch_config(self, kernel: str) -> tuple[tuning.LaunchConfig, int]:
        """Return the launch configuration, and the number of heads per tile.

        Where there are few queries, all heads that share their keys share a tile.
        """
        width = max(padded_width(self.D), padded_width(self.E))
        repeats = self.size.H // self.size.G
        if isinstance(self.plan.score, Additive):
            kernel = f"additive {kernel}"
        elif kernel == "forward":
            kernel = "few" if self.size.L <= FEW_QUERIES else "top" if self.plan.summary.top else kernel
        elif kernel == "backward" and isinstance(self.plan.bias, TensorBias):
            kernel = "biased backward"
        config = tuning.launch_config(kernel, self.q.dtype, width, self.device)
        is_shared = kernel == "few" and repeats & (repeats - 1) == 0 and repeats <= config.queries
        return config, repeats if is_shared else 1

    def _list_tiles(self, transposed: bool) -> TileLists:
        if self._encoded_mask is None:
            return TileLists(None, None, 0, 0, 0, (), ())
        assert self.plan.mask is not None
        order, counts = mask.list_tiles(
            self.plan.mask, self.tensors, self.size, self.queries_per_tile, self.launch_config.keys, self.device,
            transposed,
        )  # fmt: skip
        batch_stride, (rows, columns) = int(order.shape[0] > 1), order.shape[1:]
        return TileLists(
            order, counts, batch_stride, rows, columns, self._encoded_mask.tensors, self._encoded_mask.integers
        )

    def _make_config(self, is_last: bool) -> KernelConfig:
        top = self.plan.summary.top
        terms = () if self._encoded_mask is None else self._encoded_mask.terms
        # Weights rounded to the precision of v are good enough for the gradients of q, k and v in the same precision,
        # but not for those of parameters, some of which went into q and k.
        has_parameters = any(x.is_floating_point() for x in self.tensors[3:])
        has_exact_weights = not is_last and (self.q.dtype != self.v.dtype or has_parameters)
        return KernelConfig(
            D=self.D, E=self.E, D_padded=padded_width(self.D), E_padded=padded_width(self.E),
            queries=self.launch_config.queries, keys=self.launch_config.keys, heads_per_tile=self.heads_per_tile,
            is_sigmoid=isinstance(self.plan.normalizer, Sigmoid), top=top, top_padded=_next_power_of_two(max(top, 1)),
            num_literals=len(terms), terms=terms, is_scale_only=self._is_scale_only(),
            has_exact_weights=has_exact_weights, is_interpreted=tuning.is_interpreted(),
        )  # fmt: skip

    def _is_scale_only(self) -> bool:
        plan, score = self.plan, self.score_args
        others = (plan.softcap, plan.bias, score.key_bias, score.query_bias, score.additive)
        return isinstance(plan.normalizer, Softmax) and score.scale > 0 and all(x is None for x in others)

    def _make_score_args(self) -> ScoreArgs:
        plan, size = self.plan, self.size
        score, normalizer, bias = plan.score, plan.normalizer, plan.bias
        defaults = {"scale": _LOG2E, "alibi_offset": 0, "dropout_threshold": 0, "dropout_scale": 1.0}
        defaults |= dict.fromkeys(_ORIGIN, 0)
        args = ScoreArgs(**{**dict.fromkeys(ScoreArgs._fields), **defaults})
        if isinstance(score, Additive):
            config = self.launch_config
            args = args._replace(
                additive=additive.prepare(self.q, self.k, self.value_of(score.v), config.queries, config.keys)
            )
        elif isinstance(score, Product):
            scale = self.D**-0.5 if score.scale is None else score.scale
            key_bias, query_bias = (_times_log2e(self.value_of(x)) for x in (score.key_bias, score.query_bias))
            args = args._replace(scale=scale * _LOG2E, key_bias=key_bias, query_bias=query_bias)
        if plan.softcap is not None:
            args = args._replace(softcap=plan.softcap * _LOG2E)
        if isinstance(bias, TensorBias):
            tensor = self.value_of(bias.tensor)
            strides = [stride if n > 1 else 0 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)]
            args = args._replace(bias=BroadcastTensor(tensor, *strides))
        elif type(bias) is ALiBi:
            slopes = self.value_of(bias.slopes)
            slopes = _default_slopes(size.H, self.device) if slopes is None else slopes
            args = args._replace(alibi_slopes=_times_log2e(slopes), alibi_offset=size.offset(bias.align))
        elif bias is not None:
            table = relative_table(bias, size, torch.float32, self.tensors)
            args = args._replace(relative_bias=_times_log2e(table))
        term = self.value_of(sink_or_bias(normalizer))
        is_zero_bias = isinstance(normalizer, Sigmoid) and not isinstance(term, Tensor) and term == 0
        if term is not None and not is_zero_bias:
            term = term if isinstance(term, Tensor) else torch.full((), term, device=self.device)
            args = args._replace(sink_or_bias=_times_log2e(term.expand(size.H)))
        if plan.nonfinite_q is not None:
            args = args._replace(
                nonfinite_q=_as_bytes(self.value_of(plan.nonfinite_q)),
                nonfinite_k=_as_bytes(self.value_of(plan.nonfinite_k)),
            )
        if plan.dropout:
            threshold = min(round(plan.dropout * _TWO_POW_32), _TWO_POW_32 - 1)
            scale = 1 / (1 - plan.dropout) if plan.dropout < 1 else 0.0
            args = args._replace(seed=self.value_of(plan.seed), dropout_threshold=threshold, dropout_scale=scale)
            args = args._replace(**dict(zip(_ORIGIN, plan.origin, strict=True)))
        return args


@derived
def _default_slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's default slopes on the device. Without the cache, each call would wait for their copy from the CPU."""
    return torch.tensor(alibi_slopes(heads), device=device)


def sink_or_bias(normalizer: Any) -> Any:
    """Return the sink of a softmax or the bias of a sigmoid, as it stands in a plan."""
    return normalizer.sink if isinstance(normalizer, Softmax) else normalizer.bias


@lru_cache(1024)
def as_constexpr(config: KernelConfig) -> KernelConfig:
    """Return the configuration with its fields as compile-time constants."""
    return KernelConfig(*[tl.constexpr(x) for x in config])


def as_matrix(x: Tensor) -> Matrix:
    """Return a tensor (B, H, rows, width) as an argument of a kernel."""
    return Matrix(x, *x.stride()[:3])


def launch_kernel(kernel: Any, grid: tuple[int, ...], config: tuning.LaunchConfig, *arguments: Any) -> None:
    """Launch a kernel on a grid of programs."""
    kernel[grid](*arguments, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


def contiguous_rows(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous.

    >>> from regard.backends.triton.call import contiguous_rows
    >>> contiguous_rows(torch.zeros(1, 2, 3, 4).mT).stride()
    (24, 12, 3, 1)
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded_width(width: int) -> int:
    """Return the width of a tile that holds rows of this width: a power of 2 of at least 16, as `tl.dot` requires.

    >>> from regard.backends.triton.call import padded_width
    >>> [padded_width(width) for width in (8, 16, 65)]
    [16, 16, 128]
    """
    return max(_next_power_of_two(width), 16)


def _next_power_of_two(n: int) -> int:
    # triton.next_power_of_2 takes ten times as long.
    return 1 << (n - 1).bit_length()


def _times_log2e(x: Tensor | None) -> Tensor | None:
    return None if x is None else (x.float() * _LOG2E).contiguous()


def _as_bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)
