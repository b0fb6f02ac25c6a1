"""Summaries: what can be asked about the weights, without the weights.

All of them describe the weights as the normalizer gives them, before dropout. All but `full` take memory linear in
length, on every kernel but `reference`, and all have gradients (but `top.keys`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.tile import Sizes


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
    rows: int | tuple[int, ...] = ()
    full: bool = False

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError where something asked for does not exist."""
        if not isinstance(self.top, int) or isinstance(self.top, bool) or self.top < 0:
            raise ValueError(f"summary: top is {self.top!r}; expected a whole number >= 0: how many weights of each row")
        if self.mass is not None:
            fits = isinstance(self.mass, Tensor) and self.mass.dtype == torch.bool and self.mass.dim() in (2, 3)
            if not fits or self.mass.shape[-1] != sizes.S or self.mass.shape[:-2] not in ((), (1,), (sizes.B,)):
                got = (
                    f"shape {tuple(self.mass.shape)} and dtype {self.mass.dtype}"
                    if isinstance(self.mass, Tensor)
                    else type(self.mass).__name__
                )
                raise ValueError(
                    f"summary: mass is {got}; expected bool of shape (N, S) or (B, N, S) with B = {sizes.B}, S = {sizes.S} "
                    "(summary.groups makes one from group numbers)"
                )
        for row in self.row_numbers:
            if not isinstance(row, int) or isinstance(row, bool) or not -sizes.L <= row < sizes.L:
                raise ValueError(f"summary: rows has {row!r}; expected query numbers from {-sizes.L} to {sizes.L - 1}")

    @property
    def row_numbers(self) -> tuple[int, ...]:
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
    may be attended, the rest has weight 0 and key -1. Equal weights come in any order."""

    weights: Tensor
    keys: Tensor


class Seen(NamedTuple):
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


def groups(numbers: Tensor | Sequence[int], count: int | None = None) -> Tensor:
    """Group numbers as the membership table that `Summary(mass=...)` takes.

    Args:
        numbers: the group of each key, whole numbers of shape (S,) or (B, S); -1 for no group.
        count: how many groups there are; by default as many as the largest number says.

    Returns:
        bool tensor of shape (N, S) or (B, N, S).
    """
    numbers = torch.as_tensor(numbers)
    if numbers.dim() not in (1, 2) or numbers.is_floating_point():
        raise ValueError(
            f"groups: numbers has shape {tuple(numbers.shape)} and dtype {numbers.dtype}; expected whole numbers of "
            "shape (S,) or (B, S)"
        )
    count = int(numbers.max()) + 1 if count is None else count
    return numbers.unsqueeze(-2) == torch.arange(count, device=numbers.device)[:, None]
