"""Transports: how tensors move between the ranks of a group.

A transport has one operation, `exchange`, in which each rank gives one tensor to each rank, and of which all ranks know the
shapes. `ProcessTransport` runs it on a process group of `torch.distributed`; `ThreadTransport` on threads of this process,
so that any number of ranks can be tested and studied in one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Seconds that a rank waits for the others.
_TIMEOUT = 300.0


class Transport(Protocol):
    """The ranks of a group."""

    rank: int
    ranks: int

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give one tensor to each rank, and return the tensors that each rank gives to this one.

        Args:
            outgoing: one tensor per rank, all of one dtype and device.
            incoming: the shapes of the results, one per rank.
        """


class ProcessTransport:
    """The ranks of a process group.

    Args:
        group: the process group; None for the default one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Transport`."""
        like = outgoing[self.rank]
        received = [like if n == self.rank else like.new_empty(shape) for n, shape in enumerate(incoming)]
        operations = []
        # In the order of distance, so that not all ranks start with the same one.
        for step in range(1, self.ranks):
            to, source = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
            if outgoing[to].numel():
                operations.append(dist.P2POp(dist.isend, outgoing[to].contiguous(), self._global(to), self.group))
            if received[source].numel():
                operations.append(dist.P2POp(dist.irecv, received[source], self._global(source), self.group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class ThreadTransport:
    """One of several ranks that are threads of this process, see `run_ranks`."""

    def __init__(self, rank: int, ranks: int, board: _Board) -> None:
        self.rank, self.ranks, self._board = rank, ranks, board

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Transport`."""
        board = self._board
        for to, x in enumerate(outgoing):
            board.slots[to][self.rank] = x.detach()
        board.wait()
        received = [x if n == self.rank else x.clone() for n, x in enumerate(board.slots[self.rank])]
        board.wait()
        for shape, x in zip(incoming, received, strict=True):
            if tuple(x.shape) != tuple(shape):
                raise ValueError(f"exchange: got a tensor of shape {tuple(x.shape)}; expected {tuple(shape)}")
        return received


class _Board:
    """What the ranks of `run_ranks` share."""

    def __init__(self, ranks: int) -> None:
        self.slots: list[list[Any]] = [[None] * ranks for _ in range(ranks)]
        self._barrier = threading.Barrier(ranks)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._barrier.wait(_TIMEOUT)

    def abort(self) -> None:
        """Let the other ranks raise."""
        self._barrier.abort()


def run_ranks(ranks: int, function: Callable[[ThreadTransport], T]) -> list[T]:
    """Run a function on several ranks of one process, each a thread, and return their results in order.

    Raises:
        Exception: what the first rank that failed raised.

    >>> from regard.distributed.transport import run_ranks
    >>> def swap(transport):
    ...     given = [torch.tensor([transport.rank]) for _ in range(transport.ranks)]
    ...     return torch.cat(transport.exchange(given, [(1,)] * transport.ranks)).tolist()
    >>> run_ranks(3, swap)
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    board = _Board(ranks)
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadTransport(rank, ranks, board))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            board.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def transport_of(group: Any) -> Transport:
    """Return the transport of a `DeviceMesh` of one dimension, a process group, or None for the default group; a transport
    is returned as it is."""
    if hasattr(group, "exchange"):
        return group  # type: ignore[no-any-return]
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(f"shards: the mesh has {group.ndim} dimensions; expected one, such as mesh['cp']")
        group = group.get_group()
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shards: torch.distributed is not initialized; expected a program that torchrun starts, and a call of "
            "torch.distributed.init_process_group"
        )
    return ProcessTransport(group)
