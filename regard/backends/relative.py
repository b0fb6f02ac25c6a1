"""Biases that depend on the distance between query and key only, as tables in memory linear in length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.components.component import fill
from regard.components.position import ALiBi, Bias, TensorBias
from regard.components.tile import Sizes, Tile
from regard.plan.problem import Plan, sizes


class TensorOrRelative:
    """The classes of biases that the native and Triton kernels support: tensors, and those of the distance only."""

    def __contains__(self, kind: object) -> bool:
        return kind is TensorBias or (isinstance(kind, type) and issubclass(kind, Bias) and kind.is_relative)


def refuse_bias(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why a bias has no table of distances per head, None if it has, or is a tensor."""
    slopes: Any = plan.bias.slopes if isinstance(plan.bias, ALiBi) else None
    if slopes is not None and tensors[slopes.index].dim() == 2:
        return "it supports ALiBi slopes (H,), not (B, H)"
    return None


def relative_table(bias: Bias, size: Sizes, dtype: torch.dtype, tensors: Sequence[Tensor]) -> Tensor:
    """Return a bias that depends on the distance only, as a table (H, L + S - 1 + 64), indexed by query - key + S - 1.

    The last 64 columns are padding: kernels read whole vectors, past the last query.
    """
    # Query 0 is at the same distance from key -n as query n is from key 0.
    tile = Tile((0, 1), (0, size.H), (0, 1), (1 - size.L, size.S), size, tensors[0].device)
    table = fill(bias, tensors).bias(tile, dtype)[0, :, 0].expand(size.H, -1).flip(-1)
    return torch.nn.functional.pad(table, (0, 64)).contiguous()


def through_table(
    plan: Plan, tensors: Sequence[Tensor], gradient: Tensor, needed: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """Return the gradients of the tensors of a bias, by index, from the gradient of its table."""
    leaves = [x.detach().requires_grad_() if i in needed else x for i, x in enumerate(tensors)]
    with torch.enable_grad():
        table = relative_table(plan.bias, sizes(*tensors[:2]), gradient.dtype, leaves)  # type: ignore[arg-type]
    found = torch.autograd.grad(table, [leaves[i] for i in needed], gradient.sum_to_size(table.shape))
    return list(zip(needed, found, strict=True))
