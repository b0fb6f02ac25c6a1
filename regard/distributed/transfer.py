"""Differentiable transfers: of keys and values to the ranks that need them, and of sums over queries back to their ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.distributed.layout import Ranges
from regard.distributed.linear import linear
from regard.distributed.needs import Needs
from regard.distributed.shards import SequenceShards
from regard.distributed.transport import Transport


class Route:
    """Who sends which keys to whom.

    Args:
        shards: the shards of the keys.
        needs: the keys that each rank needs.
    """

    def __init__(self, shards: SequenceShards, needs: Needs) -> None:
        me = shards.rank
        self.transport, self.own = shards.transport, shards.ranges[me]
        self.length = shards.length_of(me)
        self.span = needs.span(me)
        # By rank: the positions within the shard that go there, and those within the span that come from there.
        self.outgoing = [_within(needs.between(self.own, rank), self.own) for rank in range(shards.ranks)]
        self.incoming = [
            _within(needs.between(ranges, me), (self.span,) if self.span[0] < self.span[1] else ())
            for ranges in shards.ranges
        ]

    def fetch(self, x: Tensor) -> Tensor:
        """Return the keys of the span, dimension 2, from the shards x of all ranks; zeros where none are needed."""
        span = self.span[1] - self.span[0]
        whole = x.new_zeros((*x.shape[:2], span, *x.shape[3:]))
        outgoing = [x.index_select(2, index.to(x.device)) for index in self.outgoing]
        shapes = [(*x.shape[:2], len(index), *x.shape[3:]) for index in self.incoming]
        for index, part in zip(self.incoming, self.transport.exchange(outgoing, shapes), strict=True):
            whole.index_copy_(2, index.to(x.device), part)
        return whole

    def give_back(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks of what they have for the keys of this shard, dimension 2, from their spans x. Sums
        are taken in the order of ranks, in at least float32."""
        dtype = x.dtype
        x = x if dtype == torch.float64 else x.float()
        outgoing = [x.index_select(2, index.to(x.device)) for index in self.incoming]
        shapes = [(*x.shape[:2], len(index), *x.shape[3:]) for index in self.outgoing]
        total = x.new_zeros((*x.shape[:2], self.length, *x.shape[3:]))
        for index, part in zip(self.outgoing, self.transport.exchange(outgoing, shapes), strict=True):
            total.index_add_(2, index.to(x.device), part)
        return total.to(dtype)


def fetch(x: Tensor, route: Route) -> Tensor:
    """`Route.fetch`, with gradients."""
    return linear(x, route.fetch, route.give_back)


def give_back(x: Tensor, route: Route) -> Tensor:
    """`Route.give_back`, with gradients."""
    return linear(x, route.give_back, route.fetch)


def attach(x: Tensor, to: Tensor) -> Tensor:
    """Return x, whose backward pass includes that of `to` with a gradient of zero: ranks without queries or keys take part
    in the transfers of the backward pass, too."""
    attached: Tensor = _Attach.apply(x, to)  # type: ignore[no-untyped-call]
    return attached


def sum_over_ranks(x: Tensor, transport: Transport) -> Tensor:
    """Return the sum of the tensors of all ranks, in the order of ranks. The gradient is the sum of the gradients."""
    total = partial(_total, transport)
    return linear(x, total, total)


def sum_gradients(x: Tensor, transport: Transport) -> Tensor:
    """Return x; its gradient is the sum of the gradients of all ranks."""
    same: Tensor = _SumGradients.apply(x, transport)  # type: ignore[no-untyped-call]
    return same


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor) -> Tensor:
        ctx.like = to
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.transport), None


def _total(transport: Transport, x: Tensor) -> Tensor:
    parts = transport.exchange([x.contiguous()] * transport.ranks, [x.shape] * transport.ranks)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _within(ranges: Ranges, of: Ranges) -> Tensor:
    """Return the indices of positions in the concatenation of the ranges `of`, which contain them."""
    indices, start = [], 0
    for first, stop in of:
        for a, b in ranges:
            low, high = max(a, first), min(b, stop)
            if low < high:
                indices.append(torch.arange(low - first + start, high - first + start))
        start += stop - first
    return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
