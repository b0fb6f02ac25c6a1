"""Projected keys and values that are computed once and attended to at every decoding step."""

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
from regard.nn.checks import check_batch_indices, check_features, check_mask, check_probability
from regard.nn.component import ComponentModule


class Memory(NamedTuple):
    """Projected keys and values, returned by `remember`. Layers accept it in place of a key.

    keys: (B, S, width), projected. values: (B, S, E). mask: which keys may be attended to.

    >>> layer = regard.nn.AdditiveAttention(query_width=8, key_width=6, width=4)
    >>> memory = layer.remember(torch.randn(2, 5, 6))
    >>> memory.keys.shape, memory.values.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 5, 6]))
    >>> beams = memory.reorder(torch.tensor([0, 0, 1, 1]))  # two beams per batch row
    >>> beams.keys.shape, torch.equal(beams.keys[1], memory.keys[0])
    (torch.Size([4, 5, 4]), True)
    """

    keys: Tensor
    values: Tensor
    mask: Mask | None = None

    def within(self, mask: Mask | None) -> Memory:
        """Return the memory with its mask and `mask` combined by AND."""
        if mask is None:
            return self
        return self._replace(mask=mask if self.mask is None else self.mask & mask)

    def reorder(self, rows: Tensor) -> Memory:
        """Return the memory of the batch rows `rows`, an integer tensor of shape (N,). Rows may repeat: `[0, 0, 0, 1,
        1, 1]` repeats each of two rows for three beams.
        """
        check_batch_indices("Memory.reorder: rows", rows)
        mask = None if self.mask is None else map_leaves(self.mask, lambda leaf: _select_rows(leaf, rows))
        return Memory(self.keys.index_select(0, rows), self.values.index_select(0, rows), mask)


def _select_rows(leaf: Any, rows: Tensor) -> Any:
    """Select batch rows of a leaf of a mask. Dimension 0 of its tensors is the batch, or 1 and broadcast."""
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, rows) if leaf.dim() and leaf.shape[0] > 1 else leaf
    if callable(leaf):
        predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = leaf
        return lambda batch, head, query, key: predicate(rows[batch], head, query, key)
    return leaf


class MemoryAttention(nn.Module):
    """Base class of layers that attend to a memory. Subclasses set `query_map` and `key_map`, and define `_score`.

    Args:
        query_width: width of the queries.
        key_width: width of the keys.
        width: width of the projected keys.
        normalizer: one of `regard.normalizer`; `Softmax()` by default. Its parameters belong to the layer.
        dropout: dropout probability of the attention weights, in training.
    """

    query_map: nn.Module
    key_map: nn.Module
    is_cross_attention = True  # the attribute of Hugging Face layers, which `regard.watch` reads

    def __init__(
        self, query_width: int, key_width: int, width: int, normalizer: Normalizer | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        for name, value in (("query_width", query_width), ("key_width", key_width), ("width", width)):
            check.integer(f"{self._name}: {name}", value, 1)
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            expected = "one of regard.normalizer, such as normalizer.Softmax(), or None"
            raise check.error(f"{self._name}: normalizer", normalizer, expected, False)
        check_probability(f"{self._name}: dropout", dropout)
        self.query_width, self.key_width, self.width = query_width, key_width, width
        self.normalizer = ComponentModule(Softmax() if normalizer is None else normalizer)
        self.dropout = dropout

    def remember(self, key: Tensor, value: Tensor | None = None, mask: Mask | None = None) -> Memory:
        """Project keys once, for use in many calls.

        Args:
            key: (B, S, key_width).
            value: (B, S, E); `key` by default.
            mask: which keys may be attended to, in every call.
        """
        check_features(f"{self._name}: key", key, "B, S", self.key_width)
        if value is None:
            value = key
        elif not check.is_float_tensor(value) or value.dim() != 3 or value.shape[:2] != key.shape[:2]:
            expected = f"a float tensor of shape (B, S, E), with (B, S) = {tuple(key.shape[:2])} as in key"
            raise check.error(f"{self._name}: value", value, expected, check.is_float_tensor(value))
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
            key: (B, S, key_width), or a `Memory` from `remember`.
            value: (B, S, E); `key` by default.
            mask: one of `regard.mask`, combined by AND with the mask of the memory. True = may attend.
            summary: which statistics of the attention weights to return.

        Returns:
            The context (B, L, E), or (B, E) for one step; with `summary`, a pair of it and an `AttentionSummary`, in
            which one step has L = 1. The context of a query that may attend to no key is 0.
        """
        memory = self._prepare_memory(query, key, value, mask)
        out: Tensor | tuple[Tensor, AttentionSummary] = self._with_query_axis(
            query, lambda rows: self._attend_memory(rows, memory, summary)
        )
        return out

    def _prepare_memory(self, query: Tensor, key: Tensor | Memory, value: Tensor | None, mask: Mask | None) -> Memory:
        """Check the arguments of `forward`. Return the memory, with `mask` included."""
        is_step = isinstance(query, Tensor) and query.dim() == 2
        check_features(f"{self._name}: query", query, "B" if is_step else "B, L", self.query_width)
        if not isinstance(key, Memory):
            memory = self.remember(key, value, mask)
        elif value is not None:
            raise ValueError(f"{self._name}: value is given with a Memory, which has its own values; expected None")
        else:
            check_mask(f"{self._name}: mask", mask)
            memory = key.within(mask)
        if memory.keys.shape[-1] != self.width:
            expected = f"(B, S, {self.width}), from `remember` of this layer"
            raise check.error(f"{self._name}: the keys of the memory", memory.keys, expected, True)
        rows = memory.keys.shape[0]
        # Two comparisons: `in` fails with symbolic sizes of a compiled graph.
        if rows != 1 and rows != query.shape[0]:
            expected = f"the batch size of key, {rows}"
            raise check.error(f"{self._name}: query", query, expected, True)
        return memory

    @staticmethod
    def _with_query_axis(query: Tensor, attend: Callable[[Tensor], Any]) -> Any:
        """Call `attend`, which takes queries (B, L, query_width), with these or with one query (B, query_width)."""
        if query.dim() == 3:
            return attend(query)
        out = attend(query[:, None])
        return (out[0][:, 0], out[1]) if isinstance(out, tuple) else out[:, 0]

    def _attend_memory(self, query: Tensor, memory: Memory, summary: Summary | None, bias: Tensor | None = None) -> Any:
        """Attend with queries (B, L, query_width); `bias` (B, L, S) is added to the scores."""
        q, k, score = self.query_map(query), memory.keys, self._score()
        if q.shape[1] == 1 and q.is_cpu and isinstance(score, Additive):
            scores = _score_single_query(q, k, score)
            bias = scores if bias is None else scores + bias
            q, k, score = q.new_zeros(len(q), 1, 1), k.new_zeros(1, k.shape[1], 1), Dot()
        return attention(
            q, k, memory.values, score=score, normalizer=self.normalizer(), mask=memory.mask, bias=bias,
            dropout=self.dropout if self.training else 0.0, summary=summary,
        )  # fmt: skip

    def _score(self) -> Score:
        """Return the score of projected queries and keys."""
        raise NotImplementedError


def make_vector(*shape: int) -> nn.Parameter:
    """Return a parameter (..., width), drawn from U(-1 / sqrt(width), 1 / sqrt(width))."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def hidden_from_watch() -> AbstractContextManager[Any]:
    """Hide the attention calls of the block, which are steps of another computation, from `regard.watch`."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()


def _score_single_query(q: Tensor, k: Tensor, score: Additive) -> Tensor:
    """Return the scores (B, 1, S) of one query (B, 1, width).

    The native kernels compute 16 queries at a time, and one query takes as long as 16. So query and keys change roles:
    the additive score is symmetric in them, and the log-sum-exp of a row with a single key is its score.
    """
    with hidden_from_watch():
        _, statistics = attention(
            k.expand(len(q), -1, -1), q, q.new_zeros(len(q), 1, 1), score=score, summary=Summary(lse=True)
        )
    assert statistics.lse is not None
    return statistics.lse[:, None]


def concat_summaries(steps: Sequence[AttentionSummary], summary: Summary) -> AttentionSummary:
    """Combine the summaries of single steps into one of all steps, as one call would return it for `summary`."""

    def concat(name: str) -> Any:
        parts = [getattr(step, name) for step in steps]
        return None if parts[0] is None else torch.cat(parts, 1)

    out = AttentionSummary(**{name: concat(name) for name in ("lse", "max", "entropy", "mass", "full")})
    if summary.top:
        tops = [step.top for step in steps if step.top is not None]
        out = out._replace(
            top=Top(torch.cat([top.weights for top in tops], 1), torch.cat([top.keys for top in tops], 1))
        )
    if summary.received:
        out = out._replace(received=torch.stack([step.received for step in steps if step.received is not None]).sum(0))
    if summary.row_numbers and out.full is not None:
        out = out._replace(rows=out.full[:, list(summary.row_numbers)])
    return out if summary.full else out._replace(full=None)
