"""A checked call: a frozen plan and its tensors.

Names of dimensions, used everywhere:

    B  batch rows            L  queries           D  width of a score (q and k)
    H  query heads           S  keys              E  width of a value
    G  key/value heads       H is a multiple of G: H/G query heads share a key/value head (grouped-query attention)

    q (B, H, L, D)    k (B, G, S, D)    v (B, G, S, E)    ->    output (B, H, L, E)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from regard.components.mask import Mask
from regard.components.normalizer import Normalizer
from regard.components.position import Bias
from regard.components.score import Score
from regard.components.summary import Summary
from regard.components.tile import Sizes
from regard.tracing import is_tracing


@dataclass(frozen=True)
class Plan:
    """What a call computes, without its tensors: frozen, hashable and serializable."""

    score: Score
    normalizer: Normalizer
    mask: Mask | None
    bias: Bias | None
    softcap: float | None
    dropout: float
    seed: Any  # Slot, or int64 of shape () once filled; None without dropout
    summary: Summary
    nonfinite_q: Any  # Slot, or bool (B, H, L) once filled: queries with NaN or inf, see `plan.nonfinite`; or None
    nonfinite_k: Any  # the same for keys and their values, (B, G, S)
    # The first batch row, head, query and key of a part of a problem, which has the dropout of the whole at its pairs.
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a backend returns, in order."""
        return ("out", *self.summary.outputs)

    def named(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return the gradients of the outputs by name, without those that are None and those of integers."""
        integers = [statistic.name for statistic in self.summary.statistics if statistic.dtype is not None]
        pairs = zip(self.outputs, gradients, strict=True)
        return {name: g for name, g in pairs if g is not None and name not in integers}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Backends look up plans in every call, so the hash is cached.
        return hash(tuple([getattr(self, name) for name in self.__dataclass_fields__]))


class Problem(NamedTuple):
    """A plan and its tensors: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E), then those of the components."""

    plan: Plan
    tensors: tuple[Tensor, ...]
    lead: Sequence[int]  # the leading dimensions of the user's q, before (L, D)
    is_eager: bool  # see `tracing.is_eager`

    def restore(self, x: Tensor) -> Tensor:
        """Reshape an output (B, H, ...) to the leading dimensions of the user's q."""
        if len(self.lead) == 2:
            return x
        return x.reshape(*self.lead, *x.shape[2:])


def empty_outputs(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return the outputs of a problem in which no query may attend to any key. The plan is filled.

    q (B, H, L, D) is in accumulation precision.
    """
    size = sizes(q, k)
    outputs = [q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=v.dtype)]
    for statistic in plan.summary.statistics:
        dtype = q.dtype if statistic.dtype is None else statistic.dtype
        outputs.append(q.new_full(statistic.shape(size), statistic.empty, dtype=dtype))
    return outputs


def sizes(q: Tensor, k: Tensor) -> Sizes:
    """Return the sizes of a problem from q (B, H, L, D) and k (B, G, S, D)."""
    if is_tracing():  # torch.jit gives sizes as tensors; its graph holds for these sizes only
        return Sizes(*[int(n) for n in (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2])])
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
