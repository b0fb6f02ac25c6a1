"""A memory: keys and values that are mapped once and attended to as often as there are steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.component import map_leaves
from regard.components.mask import Mask
from regard.components.normalizer import Normalizer, Softmax
from regard.components.score import Additive, Dot, Score
from regard.components.summary import AttentionSummary, Summary, Top
from regard.nn.component import ComponentModule


class Memory(NamedTuple):
    """What `remember` makes of keys and values; a layer takes it in the place of a key.

    keys: (B, S, width), as the score takes them. values: (B, S, E). mask: which of them may be attended to.
    """

    keys: Tensor
    values: Tensor
    mask: Mask | None = None

    def within(self, mask: Mask | None) -> Memory:
        """The memory with one more mask."""
        if mask is None:
            return self
        return self._replace(mask=mask if self.mask is None else self.mask & mask)

    def reorder(self, rows: Tensor) -> Memory:
        """The memory of these batch rows, integers of shape (N,), as often as each is named: `[0, 0, 0, 1, 1, 1]` makes
        room for three beams.
        """
        check_rows("Memory.reorder: rows", rows)
        mask = None if self.mask is None else map_leaves(self.mask, lambda leaf: _of_rows(leaf, rows))
        return Memory(self.keys.index_select(0, rows), self.values.index_select(0, rows), mask)


def _of_rows(leaf: Any, rows: Tensor) -> Any:
    """What a mask holds, for other batch rows: its tensors have them first, or one for all."""
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, rows) if leaf.dim() and leaf.shape[0] > 1 else leaf
    if callable(leaf):
        predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = leaf
        return lambda batch, head, query, key: predicate(rows[batch], head, query, key)
    return leaf


class MemoryAttention(nn.Module):
    """What layers share that attend over a memory. Subclasses make the maps of queries and keys, and say what the score is.

    Args:
        query_width, key_width: of what is given.
        width: of the keys once they are mapped.
        normalizer: one of `regard.normalizer`, `Softmax()` by default; what it learns is the layer's.
        dropout: the chance that a weight is dropped in training.
    """

    query_map: nn.Module
    key_map: nn.Module
    is_cross_attention = True  # as models of Hugging Face say it, to who watches them

    def __init__(
        self, query_width: int, key_width: int, width: int, normalizer: Normalizer | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        for name, value in (("query_width", query_width), ("key_width", key_width), ("width", width)):
            check.whole(f"{self._name}: {name}", value, 1)
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            expected = "one of regard.normalizer, such as normalizer.Softmax(), or None"
            raise check.wrong(f"{self._name}: normalizer", normalizer, expected, False)
        check_chance(f"{self._name}: dropout", dropout)
        self.query_width, self.key_width, self.width = query_width, key_width, width
        self.normalizer = ComponentModule(Softmax() if normalizer is None else normalizer)
        self.dropout = dropout

    def remember(self, key: Tensor, value: Tensor | None = None, mask: Mask | None = None) -> Memory:
        """Map keys once, for many calls.

        Args:
            key: (B, S, key_width).
            value: (B, S, E); the keys themselves by default.
            mask: which keys may be attended to, in every call.
        """
        check_axes(f"{self._name}: key", key, "B, S", self.key_width)
        if value is None:
            value = key
        elif not check.is_floats(value) or value.dim() != 3 or value.shape[:2] != key.shape[:2]:
            expected = f"floats of shape (B, S, E), with (B, S) = {tuple(key.shape[:2])} as in key"
            raise check.wrong(f"{self._name}: value", value, expected, check.is_floats(value))
        check_mask(f"{self._name}: mask", mask)
        return Memory(self.key_map(key), value, mask)

    def forward(
        self,
        query: Tensor,
        key: Tensor | Memory,
        value: Tensor | None = None,
        mask: Mask | None = None,
        *,
        summary: Summary | None = None,
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Attend to a memory.

        Args:
            query: (B, L, query_width), or (B, query_width) for one step.
            key: (B, S, key_width), or what `remember` made of it.
            value: (B, S, E); the keys themselves by default.
            mask: one of `regard.mask`, joined with that of the memory. True = may attend.
            summary: what else to tell about the weights.

        Returns:
            The context (B, L, E), or (B, E) for one step; with `summary`, a pair of it and `AttentionSummary`, where one step is
            L = 1. A row that may attend to nothing gives 0.
        """
        memory = self._memory(query, key, value, mask)
        found: Tensor | tuple[Tensor, AttentionSummary] = self._for_rows(
            query, lambda rows: self._read(rows, memory, summary)
        )
        return found

    def _memory(self, query: Tensor, key: Tensor | Memory, value: Tensor | None, mask: Mask | None) -> Memory:
        """Check what was given; the memory with all masks in it."""
        one = isinstance(query, Tensor) and query.dim() == 2
        check_axes(f"{self._name}: query", query, "B" if one else "B, L", self.query_width)
        if not isinstance(key, Memory):
            memory = self.remember(key, value, mask)
        elif value is not None:
            raise ValueError(f"{self._name}: value is given beside a memory, which has its own; expected None")
        else:
            check_mask(f"{self._name}: mask", mask)
            memory = key.within(mask)
        if memory.keys.shape[-1] != self.width:
            expected = f"(B, S, {self.width}), by `remember` of this layer"
            raise check.wrong(f"{self._name}: the keys of the memory", memory.keys, expected, True)
        rows = memory.keys.shape[0]
        # Not by `in`, which misses sizes that a compiled graph leaves open.
        if rows != 1 and rows != query.shape[0]:
            expected = f"as many batch rows as there are in key, {rows}"
            raise check.wrong(f"{self._name}: query", query, expected, True)
        return memory

    @staticmethod
    def _for_rows(query: Tensor, read: Callable[[Tensor], Any]) -> Any:
        """Call `read`, which takes queries (B, L, query_width), with those, or one, (B, query_width)."""
        if query.dim() == 3:
            return read(query)
        found = read(query[:, None])
        return (found[0][:, 0], found[1]) if isinstance(found, tuple) else found[:, 0]

    def _read(self, query: Tensor, memory: Memory, summary: Summary | None, bias: Tensor | None = None) -> Any:
        """Attend with queries (B, L, query_width); `bias` (B, L, S) is added to the scores."""
        q, k, score = self.query_map(query), memory.keys, self._score()
        if q.shape[1] == 1 and q.is_cpu and isinstance(score, Additive):
            scores = _of_one(q, k, score)
            bias = scores if bias is None else scores + bias
            q, k, score = q.new_zeros(len(q), 1, 1), k.new_zeros(1, k.shape[1], 1), Dot()
        return attention(
            q, k, memory.values, score=score, normalizer=self.normalizer(), mask=memory.mask, bias=bias,
            dropout=self.dropout if self.training else 0.0, summary=summary,
        )  # fmt: skip

    def _score(self) -> Score:
        """Of queries and keys that are mapped."""
        raise NotImplementedError


def vector(*shape: int) -> nn.Parameter:
    """What makes a number of a hidden layer (..., width): a learned vector of that width, or several."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def unwatched() -> AbstractContextManager[Any]:
    """For the time of a block, calls of attention that are but a way to compute are not seen by who watches."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()


def _of_one(q: Tensor, k: Tensor, score: Additive) -> Tensor:
    """The scores (B, 1, S) of one query (B, 1, width). Native kernels compute 16 queries at a time, and this takes them as
    long as one would: so it changes places with the keys. A score is then the log-sum-exp of a row that has no other.
    """
    with unwatched():
        _, seen = attention(
            k.expand(len(q), -1, -1), q, q.new_zeros(len(q), 1, 1), score=score, summary=Summary(lse=True)
        )
    assert seen.lse is not None
    return seen.lse[:, None]


def join(told: Sequence[AttentionSummary], summary: Summary) -> AttentionSummary:
    """What was told step by step, as if all had been told at once."""

    def along(name: str) -> Any:
        parts = [getattr(seen, name) for seen in told]
        return None if parts[0] is None else torch.cat(parts, 1)

    seen = AttentionSummary(**{name: along(name) for name in ("lse", "max", "entropy", "mass", "full")})
    if summary.top:
        tops = [seen.top for seen in told if seen.top is not None]
        seen = seen._replace(
            top=Top(torch.cat([top.weights for top in tops], 1), torch.cat([top.keys for top in tops], 1))
        )
    if summary.received:
        seen = seen._replace(received=torch.stack([one.received for one in told if one.received is not None]).sum(0))
    if summary.row_numbers and seen.full is not None:
        seen = seen._replace(rows=seen.full[:, list(summary.row_numbers)])
    return seen if summary.full else seen._replace(full=None)


def check_axes(name: str, x: object, axes: str, width: int) -> None:
    """Raise unless `x` is floats of these axes, such as "B, S", and of this width."""
    fits = check.is_floats(x)
    if not check.is_floats(x) or x.dim() != axes.count(",") + 2 or x.shape[-1] != width:
        raise check.wrong(name, x, f"floats of shape ({axes}, {width})", fits)


def check_mask(name: str, mask: object) -> None:
    """Raise unless `mask` is a mask, or None."""
    if mask is not None and not isinstance(mask, Mask):
        raise check.wrong(name, mask, "one of regard.mask, such as mask.lengths(n), True = may attend", False)


def check_chance(name: str, value: object) -> None:
    """Raise unless `value` is a number from 0 to 1."""
    if not check.is_number(value) or not 0.0 <= value <= 1.0:
        raise check.wrong(name, value, "a number from 0 to 1", check.is_number(value))


def check_rows(name: str, rows: object) -> None:
    """Raise unless `rows` is numbers of batch rows."""
    if not check.is_ints(rows) or rows.dim() != 1:
        raise check.wrong(name, rows, "integers of shape (N,), the batch row of each", check.is_ints(rows))
