"""Text classifier."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn

from regard.components import mask
from regard.components.summary import AttentionSummary, Summary
from regard.models.sentence_encoder import SentenceBatch, SentenceEncoder
from regard.nn.pooling import AttentionPooling


class Classifier(nn.Module):
    """Text classifier: a `SentenceEncoder`, attention pooling, and a linear layer. The attention weights of the pooling
    show which words the label is based on.

    Args:
        words, letters, labels: number of words, letters and labels.
        options: options of `SentenceEncoder`.

    >>> text = SentenceBatch(torch.tensor([[2, 3, 2]]), torch.tensor([3]), torch.tensor([[2, 3], [4, 0]]),
    ...                      torch.tensor([2, 1]), torch.tensor([[0, 1, 0]]))
    >>> model = Classifier(5, 6, 4, width=16).eval()
    >>> scores, statistics = model(text, Summary(full=True))
    >>> scores.shape, statistics.full.shape
    (torch.Size([1, 4]), torch.Size([1, 4, 1, 3]))

    Source: Lin et al., "A Structured Self-attentive Sentence Embedding" (2017), section 2.1.
    """

    def __init__(self, words: int, letters: int, labels: int, **options: Any) -> None:
        super().__init__()
        self.reader = SentenceEncoder(words, letters, **options)
        self.pooling = AttentionPooling(self.reader.width, num_heads=4)
        self.dropout = nn.Dropout(options.get("dropout", 0.3))
        self.output = nn.Linear(self.reader.width, labels)

    @overload
    def forward(self, text: SentenceBatch, summary: Literal[None] = ...) -> Tensor: ...
    @overload
    def forward(self, text: SentenceBatch, summary: Summary) -> tuple[Tensor, AttentionSummary]: ...
    def forward(self, text: SentenceBatch, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Return logits (B, labels); with `summary`, also an `AttentionSummary` of the pooling, with L = 1."""
        x, padding = self.reader(text), mask.lengths(text.lengths)
        if summary is None:
            out: Tensor = self.output(self.dropout(self.pooling(x, mask=padding)))
            return out
        pooled, statistics = self.pooling(x, mask=padding, summary=summary)
        return self.output(self.dropout(pooled)), statistics
