"""Encoding of masks for the native operators: nodes of seven integers each, in postfix order.

A node is (kind, four integers, the indices of two tensors). The integers are those of `Mask.integers`; of a combination,
the indices of the nodes that it combines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.backends.cpu import extension
from regard.components import predicate
from regard.components.component import slots
from regard.components.mask import And, Mask, Not, Or

# Maps the tensors of a call to an argument of an operator.
Maker = Callable[[Sequence[Tensor]], Tensor]

# The native kinds of masks have the names of the classes, and the numbers of `MaskNode::Kind` in csrc/problem.h.
_KINDS = {name: kind for kind, name in enumerate(extension.names("masks"))}
MASKS: frozenset[type[Mask]] = frozenset(vars(predicate)[name] for name in _KINDS)


def encode_mask(mask: Mask, nodes: list[int], tensors: list[Maker]) -> int:
    """Append the nodes of a mask to `nodes` and the makers of its tensors to `tensors`; return the index of its root."""
    integers, indices = list(mask.integers), [-1, -1]
    if isinstance(mask, And | Or):
        integers = [encode_mask(part, nodes, tensors) for part in (mask.left, mask.right)]
    elif isinstance(mask, Not):
        integers = [encode_mask(mask.inner, nodes, tensors)]
    else:
        for at, slot in enumerate(slots(mask)):
            indices[at] = len(tensors)
            tensors.append(_maker(slot))
    nodes += [_KINDS[type(mask).__name__], *integers, *[0] * (4 - len(integers)), *indices]
    return len(nodes) // 7 - 1


def _maker(slot: int) -> Maker:
    return lambda inputs: _convert(inputs[slot])


def _convert(x: Tensor) -> Tensor:
    """Return bool tensors as they are, and integers (), (B,) or (B, n) as int64 of two dimensions."""
    if x.dtype == torch.bool:
        return x
    return (x.reshape(-1, 1) if x.dim() < 2 else x).long().contiguous()
