"""The shards of a sequence: which positions this rank holds, and how tensors are divided and put together."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.components.predicate import Mask
from regard.distributed.layout import LAYOUTS, Ranges, best_layout, busiest, ranges_of
from regard.distributed.linear import linear
from regard.distributed.transport import Transport, transport_of


class SequenceShards:
    """A sequence of any length that is divided among the ranks of a group, which all create it with equal arguments.

    Args:
        length: the number of positions of the whole sequence. It need not be divisible by the number of ranks, and ranks may
            be empty.
        group: a `DeviceMesh` of one dimension, a process group, or None for the default group. Also a `ThreadTransport`, for
            ranks that are threads of one process.
        mask: the mask of self-attention over the sequence, from which the layout is chosen.
        layout: "even", "mirrored" or "balanced", see `layout.ranges_of`. By default the one with the fewest ranges whose
            busiest rank has at most 1.05 times the work of the best one.

    Attributes:
        rank, ranks: the number of this rank, and of all.
        ranges: the ranges of positions of each rank.
        layout: the name of the layout.

    Raises:
        ValueError, TypeError: an argument is invalid.
        RuntimeError: `torch.distributed` is not initialized.

    >>> from regard.distributed.shards import SequenceShards
    >>> from regard.distributed.linear import linear
    from regard.distributed.transport import run_ranks
    >>> x = torch.arange(7.0)[None, :, None]
    >>> def work(transport):
    ...     shards = SequenceShards(7, transport, layout="mirrored")
    ...     local = shards.shard(x, dim=1)
    ...     return shards.positions.tolist(), torch.equal(shards.gather(local, dim=1), x)
    >>> run_ranks(2, work)
    [([0, 5, 6], True), ([1, 2, 3, 4], True)]
    """

    def __init__(self, length: int, group: Any = None, mask: Mask | None = None, layout: str | None = None) -> None:
        check.integer("shards: length", length, 0)
        if mask is not None and not isinstance(mask, Mask):
            raise check.error("shards: mask", mask, "a mask of regard.mask, or None", False)
        if layout is not None and layout not in LAYOUTS:
            raise check.error("shards: layout", layout, " or ".join(map(repr, LAYOUTS)), True)
        self.transport: Transport = transport_of(group)
        self.rank, self.ranks = self.transport.rank, self.transport.ranks
        self.length, self.mask = length, mask
        self.layout = best_layout(length, self.ranks, mask) if layout is None else layout
        self.ranges: list[Ranges] = ranges_of(self.layout, length, self.ranks, mask)

    def __repr__(self) -> str:
        lengths = ", ".join(str(self.length_of(rank)) for rank in range(self.ranks))
        return f"SequenceShards({self.length}, {self.layout}, rank {self.rank} of {self.ranks}: {lengths})"

    def length_of(self, rank: int) -> int:
        """Return the number of positions of a rank."""
        return sum(stop - first for first, stop in self.ranges[rank])

    @property
    def busiest(self) -> float:
        """The work of the busiest rank in self-attention with the mask, relative to the mean: 1 is perfect balance."""
        return busiest(self.ranges, self.length, self.mask)

    @cached_property
    def positions(self) -> Tensor:
        """The positions of this rank in the whole sequence, int64 (n,), for example for `position.Rotary`."""
        return _positions(self.ranges[self.rank])

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Return the part of this rank of a tensor that has the whole sequence as its dimension `dim`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"shard: x has {x.shape[dim]} positions in dimension {dim}; expected {self.length}")
        parts = [x.narrow(dim, first, stop - first) for first, stop in self.ranges[self.rank]]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the whole of a tensor of which each rank has the part of its positions: the inverse of `shard`.

        In the backward pass, the gradient of a part is the sum of the gradients that all ranks have for it.
        """
        dim = dim % x.dim()
        if x.shape[dim] != self.length_of(self.rank):
            raise ValueError(
                f"gather: x has {x.shape[dim]} positions in dimension {dim}; expected {self.length_of(self.rank)}, those of "
                f"rank {self.rank}"
            )
        return linear(x, partial(self._gather, dim), partial(self._scatter, dim))

    def _gather(self, dim: int, x: Tensor) -> Tensor:
        shapes = [_with_length(x, dim, self.length_of(rank)) for rank in range(self.ranks)]
        whole = x.new_empty(_with_length(x, dim, self.length))
        for ranges, part in zip(self.ranges, self.transport.exchange([x] * self.ranks, shapes), strict=True):
            whole.index_copy_(dim, _positions(ranges).to(x.device), part)
        return whole

    def _scatter(self, dim: int, x: Tensor) -> Tensor:
        """Return the sum over all ranks of what they have for the positions of this one."""
        outgoing = [x.index_select(dim, _positions(ranges).to(x.device)) for ranges in self.ranges]
        shape = outgoing[self.rank].shape
        return torch.stack(self.transport.exchange(outgoing, [shape] * self.ranks)).sum(0)


def _with_length(x: Tensor, dim: int, length: int) -> tuple[int, ...]:
    return (*x.shape[:dim], length, *x.shape[dim + 1 :])


def _positions(ranges: Ranges) -> Tensor:
    parts = [torch.arange(first, stop) for first, stop in ranges]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
