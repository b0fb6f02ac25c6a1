"""Dropout whose mask is a pure function of (seed, batch, head, query, key).

Every backend can compute it for any tile, in any order, and drops the same weights. The mixing step is the 32-bit hash
"lowbias32" of Chris Wellons, "Prospecting for Hash Functions" (2018). Each row (batch, head, query) hashes to an offset and
an odd factor, so that the streams of two rows are not shifts of each other; each key then takes one mixing step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.components.tile import Tile

_HALF = 1 << 31


def _signed(value: int) -> int:
    """Return the int32 with the bits of an unsigned 32-bit constant."""
    return value - (1 << 32) if value >= _HALF else value


_A, _B, _GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B9)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (that of PyTorch is arithmetic)."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * _A
    x = (x ^ _shift(x, 15)) * _B
    return x ^ _shift(x, 16)


def _low32(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64 as int32."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= _HALF, x - (1 << 32), x).to(torch.int32)


def keep(tile: Tile, seed: Tensor, rate: float, origin: Sequence[int] = (0, 0, 0, 0)) -> Tensor:
    """Return which weights of a tile dropout keeps.

    Args:
        tile: the tile, of shape (b, h, l, s).
        seed: the seed, int64 of shape ().
        rate: the dropout probability, 0 to 1.
        origin: the indices of the first batch row, head, query and key of the problem.

    Returns:
        A bool tensor of shape (b, h, l, s), True where the weight is kept.
    """
    row = _mix(_low32(seed) ^ _GOLDEN)
    batch, head, query, key = (
        x + first for x, first in zip((tile.batch, tile.head, tile.query, tile.key), origin, strict=True)
    )
    for part in (seed >> 32, batch, head, query):
        row = _mix(row * _GOLDEN ^ _low32(part))
    factor = _mix(row ^ _GOLDEN) | 1
    word = _mix((key.to(torch.int32) + row) * factor)
    threshold = min(round(rate * (1 << 32)), (1 << 32) - 1)
    if rate >= 1.0:
        return torch.zeros_like(word, dtype=torch.bool)
    # Flipping the top bit makes the signed comparison the unsigned one.
    return (word ^ -_HALF) >= threshold - _HALF
