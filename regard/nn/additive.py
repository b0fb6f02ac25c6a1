"""Additive (Bahdanau) attention: a hidden layer over the sum of query and key computes the score."""

from __future__ import annotations

from torch import nn

from regard.components.normalizer import Normalizer
from regard.components.score import Additive, Score
from regard.nn.memory import MemoryAttention, make_vector


class AdditiveAttention(MemoryAttention):
    """Additive attention: the context of a query is a weighted sum of the values.

        score_ij = v . tanh(W query_i + b + U key_j)        context_i = sum_j softmax(score_i)_j value_j

    `W`, `b`, `U` and `v` are learned. `remember` projects keys once for many calls:

    >>> layer = regard.nn.AdditiveAttention(query_width=8, key_width=6, width=4)
    >>> encoded, state = torch.randn(2, 5, 6), torch.randn(2, 8)
    >>> memory = layer.remember(encoded, mask=mask.lengths(torch.tensor([5, 1])))  # U encoded; the values are `encoded`
    >>> context = layer(state, memory)  # one step
    >>> context.shape, torch.allclose(context[1], encoded[1, 0])  # the second row may attend to one key only
    (torch.Size([2, 6]), True)
    >>> scores = torch.tanh(layer.query_map(state)[:, None] + layer.key_map(encoded)) @ layer.v
    >>> torch.allclose(context[0], scores[0].softmax(-1) @ encoded[0])
    True

    Args:
        query_width: width of the queries (B, L, query_width).
        key_width: width of the keys (B, S, key_width).
        width: width of the hidden layer.
        bias: whether to learn `b`.
        normalizer: one of `regard.normalizer`; `Softmax()` by default. Its parameters belong to the layer.
        dropout: dropout probability of the attention weights, in training.

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
        self.v = make_vector(width)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

    def _score(self) -> Score:
        return Additive(self.v)
