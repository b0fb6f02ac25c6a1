"""The results of the parts of a problem, one per range of the queries of a rank, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.components.statistic import RowWeights, Statistic, TopKeys
from regard.components.summary import AttentionSummary, Summary
from regard.components.tile import Box, Sizes
from regard.distributed.shards import SequenceShards
from regard.distributed.transfer import Route, attach, give_back, sum_over_ranks


class Results:
    """The outputs of the parts of a problem.

    Args:
        size: the sizes of the whole problem.
        summary: the requested statistics.
        route: how the keys came to this rank.
        shards: the shards of the queries.
    """

    def __init__(self, size: Sizes, summary: Summary, route: Route, shards: SequenceShards) -> None:
        self._size, self._summary, self._route, self._shards = size, summary, route, shards
        self._outputs: list[tuple[Box, dict[str, Tensor]]] = []
        self._rows = [row % max(size.L, 1) for row in summary.row_numbers]

    def summary_of(self, box: Box) -> Summary:
        """Return the summary to request from a part."""
        mass = self._summary.mass
        rows = tuple(row - box.q[0] for row in self._rows if box.q[0] <= row < box.q[1])
        return replace(self._summary, mass=None if mass is None else mass[..., slice(*box.k)], rows=rows)

    def add(self, box: Box, names: Sequence[str], outputs: Sequence[Tensor]) -> None:
        """Add the outputs of a part."""
        self._outputs.append((box, dict(zip(names, outputs, strict=True))))

    def put_together(self, q: Tensor, keys: Tensor, v: Tensor) -> tuple[Tensor, AttentionSummary]:
        """Return the output and the statistics.

        Args:
            q: the queries of this rank. keys: the keys and values that were fetched. v: the values of this rank.
        """
        outs = [outputs["out"] for _, outputs in self._outputs]
        out = torch.cat(outs, 2) if outs else q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=v.dtype)
        out = attach(out, keys)
        found = []
        for statistic in self._summary.statistics:
            parts = [(box, outputs[statistic.name]) for box, outputs in self._outputs if statistic.name in outputs]
            found.append(self._join(statistic, parts, q, keys))
        return out, AttentionSummary.of(self._summary, found)

    def _join(self, statistic: Statistic, parts: Sequence[tuple[Box, Tensor]], q: Tensor, keys: Tensor) -> Tensor:
        size, axes = self._size, statistic.axes
        local = replace(size, L=q.shape[2])
        dtype = torch.promote_types(q.dtype, torch.float32) if statistic.dtype is None else statistic.dtype
        if isinstance(statistic, RowWeights):
            return self._join_rows(statistic, parts, attach(q.new_zeros((), dtype=dtype), keys))
        if "S" in axes and "L" not in axes:
            return self._sum_over_queries(statistic, parts, attach(q.new_zeros((), dtype=dtype), keys))
        found = []
        for box, x in parts:
            if isinstance(statistic, TopKeys):
                x = torch.where(x < 0, x, x + box.k[0])
            found.append(_pad_keys(x, axes, box, size.S, statistic.empty))
        if found:
            return torch.cat(found, axes.index("L"))
        return q.new_full(statistic.shape(local), statistic.empty, dtype=dtype)

    def _sum_over_queries(self, statistic: Statistic, parts: Sequence[tuple[Box, Tensor]], zero: Tensor) -> Tensor:
        """Return the sums of all ranks for the keys of this one."""
        axis, span = statistic.axes.index("S"), self._route.span
        shape = statistic.shape(replace(self._size, S=span[1] - span[0]))
        total = zero.expand(shape)
        for box, x in parts:
            around = [0, 0] * (x.dim() - 1 - axis) + [box.k[0] - span[0], span[1] - box.k[1]]
            total = total + pad(x, around)
        return give_back(total.movedim(axis, 2), self._route).movedim(2, axis)

    def _join_rows(self, statistic: RowWeights, parts: Sequence[tuple[Box, Tensor]], zero: Tensor) -> Tensor:
        """Return the rows of all ranks, (B, H, R, S)."""
        found: dict[int, Tensor] = {}
        for box, x in parts:
            x = _pad_keys(x, "BHRS", box, self._size.S, 0.0)
            within = [n for n, row in enumerate(self._rows) if box.q[0] <= row < box.q[1]]
            found.update(zip(within, x.unbind(2), strict=True))
        blank = zero.expand(self._size.B, self._size.H, self._size.S)
        rows = torch.stack([found.get(n, blank) for n in range(len(self._rows))], 2)
        return sum_over_ranks(rows, self._shards.transport)


def _pad_keys(x: Tensor, axes: str, box: Box, length: int, value: float) -> Tensor:
    """Return a statistic of pairs for all S keys; others are returned as they are."""
    if "S" not in axes:
        return x
    axis = axes.index("S")
    around = [0, 0] * (x.dim() - 1 - axis) + [box.k[0], length - box.k[1]]
    return pad(x, around, value=value)
