"""Summaries: statistics of the attention weights that do not materialize the weights.

All statistics describe the weights after normalization and before dropout. All but `full` need memory linear in the
length (except on the backend "reference"), and all but `top.keys` are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import check
from regard.components.statistic import (
    BUILT_IN,
    Mass,
    Parts,
    RowWeights,
    Statistic,
    TopKeys,
    TopWeights,
    Weights,
)
from regard.components.tile import Sizes
from regard.deprecated import getter
from regard.tracing import has_values

__all__ = ["AttentionSummary", "Parts", "Statistic", "Summary", "Top", "Weights", "groups"]


@dataclass(frozen=True)
class Summary:
    """The statistics of the attention weights that `attention` returns. A row consists of the weights of one query.

    Args:
        lse: log(sum_j exp(s_j)) of each row, including a sink; -inf if the query may attend to no key. The scores s_j
            include scale, softcap, bias and mask.
        max: largest weight of each row.
        entropy: -sum_j p_j log p_j of each row, in nats, without a sink.
        top: number k of the largest weights of each row to return, with their keys.
        received: sum of the weights of each key over all queries.
        mass: sum of the weights of each row over each of N groups of keys, given by a bool tensor (N, S) or (B, N, S).
            `summary.groups` makes it from group ids.
        rows: return all weights of these queries: an int or ints, negative ones count from the end.
        full: return all weights (B, H, L, S). This materializes them.
        other: statistics of your own, objects of subclasses of `Statistic`.

    >>> q, k, v = torch.zeros(2, 4), torch.zeros(4, 4), torch.zeros(4, 1)
    >>> request = Summary(lse=True, entropy=True, received=True, mass=summary.groups([0, 0, 0, 1]), rows=-1)
    >>> _, stats = regard.attention(q, k, v, summary=request)  # all weights are 1/4
    >>> stats.lse.exp(), stats.entropy.exp(), stats.received
    (tensor([4., 4.]), tensor([4., 4.]), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    >>> stats.mass, stats.rows
    (tensor([[0.7500, 0.2500],
            [0.7500, 0.2500]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """

    lse: bool = False
    max: bool = False
    entropy: bool = False
    top: int = 0
    received: bool = False
    mass: Tensor | None = None
    rows: int | Sequence[int] = ()
    full: bool = False
    other: Sequence[Statistic] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rows, list | range):
            object.__setattr__(self, "rows", tuple(self.rows))
        if isinstance(self.other, list):
            object.__setattr__(self, "other", tuple(self.other))

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError or TypeError if a field is invalid or does not fit the problem."""
        for name in [statistic.name for statistic in _FLAGS]:
            if not isinstance(flag := getattr(self, name), bool):
                raise check.error(f"summary: {name}", flag, "True or False", False)
        check.integer("summary: top", self.top, 0, ", the number of weights of each row")
        if self.mass is not None:
            fits = check.is_bool_tensor(self.mass)
            shape: tuple[int, ...] = tuple(self.mass.shape) if fits else ()
            if len(shape) not in (2, 3) or shape[-1] != sizes.S or shape[:-2] not in ((), (1,), (sizes.B,)):
                expected = f"bool of shape (N, S) or (B, N, S) with B = {sizes.B} and S = {sizes.S}"
                raise check.error("summary: mass", self.mass, f"{expected} (summary.groups makes it)", fits)
        if not isinstance(self.rows, int | tuple):
            raise check.error(
                "summary: rows", self.rows, "an integer, or a sequence of ints: indices of queries", False
            )
        for row in self.row_numbers:
            if not check.is_int(row) or not -sizes.L <= row < sizes.L:
                raise check.error("summary: rows", row, f"ints from {-sizes.L} to {sizes.L - 1}", check.is_int(row))
        self._check_other()

    @property
    def depends_on_lengths(self) -> bool:
        """Whether `check` depends on the lengths L and S."""
        return self.mass is not None or self.rows != ()

    @property
    def row_numbers(self) -> tuple[int, ...]:
        """The indices of the queries in `rows`."""
        return (self.rows,) if isinstance(self.rows, int) else tuple(self.rows)

    def _check_other(self) -> None:
        expected = "a tuple of objects of subclasses of summary.Statistic, with different names"
        if not isinstance(self.other, tuple):
            raise check.error("summary: other", self.other, expected, False)
        names = {"out", "dropped", *(statistic.name for statistic in BUILT_IN)}
        for statistic in self.other:
            if not isinstance(statistic, Statistic) or type(statistic) is Statistic:
                raise check.error("summary: other", statistic, expected, False)
            if not statistic.name or statistic.name in names:
                raise ValueError(f"summary: other has a statistic named {statistic.name!r}; expected {expected}")
            names.add(statistic.name)
            if not statistic.axes.startswith("BH") or len(set(statistic.axes)) != len(statistic.axes):
                raise ValueError(
                    f"summary: {statistic.name} has axes {statistic.axes!r}; expected different letters, the first two BH"
                )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What is requested, in the order in which backends return it."""
        found: list[Statistic] = [statistic for statistic in _FLAGS if getattr(self, statistic.name)]
        if self.top:
            found += [TopWeights(self.top), TopKeys(self.top)]
        if self.mass is not None:
            found.append(Mass(self.mass))
        if self.row_numbers:
            found.append(RowWeights(self.row_numbers))
        return (*found, *self.other)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a backend returns for this summary, in order."""
        if self.mass is None and self.rows == () and self.other == ():
            names = _NAMES[tuple([getattr(self, name) for name in _FLAG_NAMES])]
            return (*names, TopWeights.name, TopKeys.name) if self.top else names
        return tuple([statistic.name for statistic in self.statistics])


# The statistics without parameters: a field of the same name, True or False, requests each of them.
_FLAGS = [kind() for kind in BUILT_IN if not is_dataclass(kind)]
_FLAG_NAMES = tuple(statistic.name for statistic in _FLAGS)
# The names that each combination of them requests. Finding them in a call takes longer than computing a short one.
_NAMES: dict[tuple[bool, ...], tuple[str, ...]] = {
    flags: tuple(name for name, flag in zip(_FLAG_NAMES, flags, strict=True) if flag)
    for flags in product((False, True), repeat=len(_FLAGS))
}


class Top(NamedTuple):
    """The k largest weights of each row (B, H, L, k) and their keys (B, H, L, k), in descending order. If a query may
    attend to fewer than k keys, the remaining weights are 0 and their keys -1. The order of equal weights is
    unspecified.

    >>> q, k = torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0], [2.0]])
    >>> _, stats = regard.attention(q, k, k, mask=mask.prefix(2), summary=Summary(top=3))
    >>> stats.top.keys
    tensor([[ 1,  0, -1]])
    """

    weights: Tensor
    keys: Tensor


class AttentionSummary(NamedTuple):
    """Statistics of the attention weights; None for those that were not requested. See `Summary` for their definitions.

    `lse`, `max`, `entropy`: (B, H, L). `top`: two tensors (B, H, L, k), see `Top`. `received`: (B, H, S). `mass`:
    (B, H, L, N). `rows`: (B, H, R, S). `full`: (B, H, L, S). `other`: those of `Summary(other=...)` by name. Leading
    dimensions are those of q. The dtype is float32, or float64 for float64 inputs.

    >>> x = torch.randn(2, 3, 5, 4)
    >>> _, stats = regard.attention(x, x, x, summary=Summary(max=True, received=True))
    >>> stats.max.shape, stats.received.shape, stats.lse
    (torch.Size([2, 3, 5]), torch.Size([2, 3, 5]), None)
    """

    lse: Tensor | None = None
    max: Tensor | None = None
    entropy: Tensor | None = None
    top: Top | None = None
    received: Tensor | None = None
    mass: Tensor | None = None
    rows: Tensor | None = None
    full: Tensor | None = None
    other: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, summary: Summary, results: Iterable[Tensor]) -> AttentionSummary:
        """Return the results of a summary's statistics, given in order, by name."""
        named: dict[str, Any] = dict(zip(summary.outputs, results, strict=True))
        if summary.other:
            named["other"] = {statistic.name: named.pop(statistic.name) for statistic in summary.other}
        if summary.top:
            named["top"] = Top(named.pop(TopWeights.name), named.pop(TopKeys.name))
        return cls(**named)

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors by the names of their statistics."""
        top = {TopWeights.name: self.top.weights, TopKeys.name: self.top.keys} if self.top else {}
        fields = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return {**fields, **top, **(self.other or {})}

    def each(self, change: Callable[[Tensor], Tensor]) -> AttentionSummary:
        """Apply a function to each of the tensors."""
        fields = {name: change(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        other = self.other and {name: change(x) for name, x in self.other.items()}
        return self._replace(top=self.top and Top(*map(change, self.top)), other=other, **fields)


def groups(numbers: Tensor | Sequence[int], count: int | None = None) -> Tensor:
    """Return the membership table for `Summary(mass=...)` from the group id of each key.

    Args:
        numbers: group id of each key, an integer tensor (S,) or (B, S), or a list of ints; -1 for no group.
        count: number N of groups; by default one more than the largest id. Required where values of tensors cannot be read.

    Returns:
        bool tensor of shape (N, S) or (B, N, S).

    >>> summary.groups([0, 1, 1, -1])
    tensor([[ True, False, False, False],
            [False,  True,  True, False]])
    """
    if isinstance(numbers, list | tuple) and all(check.is_int(number) for number in numbers):
        numbers = torch.tensor(numbers, dtype=torch.int64)
    if not check.is_integer_tensor(numbers) or numbers.dim() not in (1, 2):
        expected = "a list of ints, or an integer tensor of shape (S,) or (B, S)"
        raise check.error("groups: numbers", numbers, expected, check.is_integer_tensor(numbers))
    if count is None or has_values(numbers):
        least, largest = (int(x) for x in numbers.aminmax()) if numbers.numel() else (-1, -1)
        if least < -1:
            raise ValueError(f"groups: numbers has {least}; expected numbers >= 0, or -1 for no group")
        count = largest + 1 if count is None else count
        check.integer("groups: count", count, largest + 1, ", one more than the largest number, or None")
    return numbers.unsqueeze(-2) == torch.arange(count, device=numbers.device)[:, None]


__getattr__ = getter("regard.components.summary")
