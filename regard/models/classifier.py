"""A label a text."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn

from regard.components import mask
from regard.components.summary import AttentionSummary, Summary
from regard.models.reader import Reader, Words
from regard.nn.pooling import AttentionPooling


class Classifier(nn.Module):
    """Reads a text, makes one vector of it by learned queries, and scores every label. What the queries looked at is what
    the label was given for.

    Args:
        words, letters, labels: how many there are.
        options: those of `Reader`.

    Source: Lin et al., "A Structured Self-attentive Sentence Embedding" (2017), section 2.1.
    """

    def __init__(self, words: int, letters: int, labels: int, **options: Any) -> None:
        super().__init__()
        self.reader = Reader(words, letters, **options)
        self.pooling = AttentionPooling(self.reader.width, num_heads=4)
        self.dropout = nn.Dropout(options.get("dropout", 0.3))
        self.output = nn.Linear(self.reader.width, labels)

    @overload
    def forward(self, text: Words, summary: Literal[None] = ...) -> Tensor: ...
    @overload
    def forward(self, text: Words, summary: Summary) -> tuple[Tensor, AttentionSummary]: ...
    def forward(self, text: Words, summary: Summary | None = None) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Scores (B, labels), before softmax; with `summary`, also what the query (L = 1) looked at."""
        x, known = self.reader(text), mask.lengths(text.lengths)
        if summary is None:
            out: Tensor = self.output(self.dropout(self.pooling(x, mask=known)))
            return out
        pooled, seen = self.pooling(x, mask=known, summary=summary)
        return self.output(self.dropout(pooled)), seen
