"""Texts of several lengths without padding: torch's nested tensors, of either layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.components import mask as masks
from regard.components.mask import Mask


def padded(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A nested tensor (B, ..., L, D) with zeros behind what is shorter, and how long each of its texts is (B,); None where
    more than L and D differ from text to text.
    """
    rows = x.unbind()
    if len({row.shape[:-2] for row in rows}) != 1:
        return None
    high, wide = (max(row.shape[axis] for row in rows) for axis in (-2, -1))
    filled = [F.pad(row, (0, wide - row.shape[-1], 0, high - row.shape[-2])) for row in rows]
    return torch.stack(filled), torch.tensor([row.shape[-2] for row in rows], device=x.device)


def within(queries: Tensor, keys: Tensor, L: int, S: int) -> Mask:
    """A mask for L queries and S keys, of which each text has so many (B,): what is padding attends to nothing, and nothing
    attends to it.
    """
    # Queries and keys that are padding belong to documents that have nothing else in them: arithmetic, on every kernel.
    sides = ((queries, L, 1), (keys, S, 2))
    q, k = ((torch.arange(size, device=n.device) >= n[:, None]) * other for n, size, other in sides)
    return masks.documents((q, k))
