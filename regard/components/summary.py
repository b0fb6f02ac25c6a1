"""Summaries: what can be asked about the weights, without the weights.

All of them describe the weights as the normalizer gives them, before dropout. All but `full` take memory linear in
length, on every kernel but `reference`, and all have gradients (but `top.keys`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard import check
from regard.components.tile import Sizes
from regard.deprecated import getter


@dataclass(frozen=True)
class Summary:
    """Which summaries to take.

    Args:
        lse: log of the sum of exp(score) over the keys, a sink included; -inf for a row that may attend to nothing.
        max: the largest weight of each row.
        entropy: -sum_j p_j log p_j of each row, in nats, over the keys.
        top: the k largest weights of each row and their keys.
        received: the sum of each key's weights over the queries.
        mass: bool, (N, S) or (B, N, S): the weight that each row gives to each of N groups of keys. `groups` makes
            one from group numbers.
        rows: the whole weights of these queries (negative numbers count from the end).
        full: all weights, L x S of them. This one materialises.
    """

    lse: bool = False
    max: bool = False
    entropy: bool = False
    top: int = 0
    received: bool = False
    mass: Tensor | None = None
    rows: int | Sequence[int] = ()
    full: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rows, list | range):
            object.__setattr__(self, "rows", tuple(self.rows))

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError or TypeError where something asked for does not exist."""
        for name in ("lse", "max", "entropy", "received", "full"):
            if not isinstance(flag := getattr(self, name), bool):
                raise check.wrong(f"summary: {name}", flag, "True or False", False)
        check.whole("summary: top", self.top, 0, ": how many weights of each row")
        if self.mass is not None:
            fits = check.is_bools(self.mass)
            shape: tuple[int, ...] = tuple(self.mass.shape) if fits else ()
            if len(shape) not in (2, 3) or shape[-1] != sizes.S or shape[:-2] not in ((), (1,), (sizes.B,)):
                expected = f"bool of shape (N, S) or (B, N, S) with B = {sizes.B} and S = {sizes.S}"
                raise check.wrong("summary: mass", self.mass, f"{expected} (summary.groups makes it)", fits)
        if not isinstance(self.rows, int | tuple):
            raise check.wrong("summary: rows", self.rows, "an int, or a sequence of ints: numbers of queries", False)
        for row in self.row_numbers:
            if not check.is_int(row) or not -sizes.L <= row < sizes.L:
                raise check.wrong("summary: rows", row, f"ints from {-sizes.L} to {sizes.L - 1}", check.is_int(row))

    @property
    def row_numbers(self) -> tuple[int, ...]:
        """The queries whose rows are asked for."""
        return (self.rows,) if isinstance(self.rows, int) else tuple(self.rows)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel gives for this summary, in order."""
        names = [name for name in ("lse", "max", "entropy", "received", "full") if getattr(self, name)]
        names += ["top_weights", "top_keys"] if self.top else []
        names += ["mass"] if self.mass is not None else []
        names += ["rows"] if self.row_numbers else []
        return tuple(names)


class Top(NamedTuple):
    """The largest weights of each row (B, H, L, k), and their keys (B, H, L, k), largest first. Where fewer than k keys
    may be attended, the rest has weight 0 and key -1. Equal weights come in any order.
    """

    weights: Tensor
    keys: Tensor


class AttentionSummary(NamedTuple):
    """The summaries of a call; None where one was not asked for.

    `lse`, `max`, `entropy`: (B, H, L). `top`: see `Top`. `received`: (B, H, S). `mass`: (B, H, L, N).
    `rows`: (B, H, R, S). `full`: (B, H, L, S). Where q has other leading axes than (B, H), so have these.
    In float32 (float64 for float64 input).
    """

    lse: Tensor | None = None
    max: Tensor | None = None
    entropy: Tensor | None = None
    top: Top | None = None
    received: Tensor | None = None
    mass: Tensor | None = None
    rows: Tensor | None = None
    full: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> AttentionSummary:
        """The summaries, each changed alike."""
        fields = {name: change(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(top=self.top and Top(*map(change, self.top)), **fields)


def groups(numbers: Tensor | Sequence[int], count: int | None = None) -> Tensor:
    """Group numbers as the membership table that `Summary(mass=...)` takes.

    Args:
        numbers: the group of each key, integers of shape (S,) or (B, S); -1 for no group.
        count: how many groups there are; by default as many as the largest number says.

    Returns:
        bool tensor of shape (N, S) or (B, N, S).
    """
    if isinstance(numbers, list | tuple) and all(check.is_int(number) for number in numbers):
        numbers = torch.tensor(numbers, dtype=torch.int64)
    if not check.is_ints(numbers) or numbers.dim() not in (1, 2):
        expected = "a list of ints, or integers of shape (S,) or (B, S)"
        raise check.wrong("groups: numbers", numbers, expected, check.is_ints(numbers))
    least, largest = (int(x) for x in numbers.aminmax()) if numbers.numel() else (-1, -1)
    if least < -1:
        raise ValueError(f"groups: numbers has {least}; expected numbers >= 0, or -1 for no group")
    if count is None:
        count = largest + 1
    check.whole("groups: count", count, largest + 1, ", one more than the largest number, or None")
    return numbers.unsqueeze(-2) == torch.arange(count, device=numbers.device)[:, None]


__getattr__ = getter("regard.components.summary")
