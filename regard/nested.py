"""Nested tensors, of jagged or strided layout: batches of sequences of different lengths without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.components import mask as masks
from regard.components.mask import Mask


def to_padded(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Pad a nested tensor (B, ..., L, D) with zeros.

    Returns:
        The padded tensor and the length of each sequence (B,); None where other dimensions than L and D are ragged.
    """
    sequences = x.unbind()
    if len({sequence.shape[:-2] for sequence in sequences}) != 1:
        return None
    L, D = (max(sequence.shape[axis] for sequence in sequences) for axis in (-2, -1))
    padded = [F.pad(sequence, (0, D - sequence.shape[-1], 0, L - sequence.shape[-2])) for sequence in sequences]
    return torch.stack(padded), torch.tensor([sequence.shape[-2] for sequence in sequences], device=x.device)


def length_mask(queries: Tensor, keys: Tensor, L: int, S: int) -> Mask:
    """Return a mask for L queries and S keys that excludes padding on both sides.

    queries, keys: the lengths of the sequences (B,).
    """
    # Padding queries get document 1 and padding keys document 2, which have nothing in common. Every backend takes
    # document masks.
    sides = ((queries, L, 1), (keys, S, 2))
    q, k = ((torch.arange(size, device=n.device) >= n[:, None]) * document for n, size, document in sides)
    return masks.documents((q, k))
