"""Additive attention: query and key are added, in a hidden layer that tells how well they match."""

from __future__ import annotations

from torch import nn

from regard.components.normalizer import Normalizer
from regard.components.score import Additive, Score
from regard.nn.memory import MemoryAttention, vector


class AdditiveAttention(MemoryAttention):
    """A context per query: the values, weighed by how well their keys match.

        score_ij = v . tanh(W query_i + b + U key_j)        context_i = sum_j softmax(score_i)_j value_j

    `W`, `b`, `U` and `v` are learned. The keys are mapped once where many calls attend to the same:

    >>> layer = AdditiveAttention(query_width=256, key_width=512, width=128)
    >>> memory = layer.remember(encoded, mask=mask.lengths(n))  # U encoded; values are `encoded` itself
    >>> for _ in range(steps):
    ...     context = layer(state, memory)  # (B, 256) -> (B, 512)

    Args:
        query_width: of the queries (B, L, query_width).
        key_width: of the keys (B, S, key_width).
        width: of the hidden layer.
        bias: learn `b` too.
        normalizer: one of `regard.normalizer`, `Softmax()` by default; what it learns is the layer's.
        dropout: the chance that a weight is dropped in training.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015),
    appendix A.1.2.
    """

    def __init__(
        self,
        query_width: int,
        key_width: int,
        width: int,
        *,
        bias: bool = True,
        normalizer: Normalizer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(query_width, key_width, width, normalizer, dropout)
        self.query_map = nn.Linear(query_width, width, bias)
        self.key_map = nn.Linear(key_width, width, bias=False)
        self.v = vector(width)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

    def _score(self) -> Score:
        return Additive(self.v)
