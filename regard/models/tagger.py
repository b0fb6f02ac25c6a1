"""A label a word."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.models.reader import Reader, Words


class Tagger(nn.Module):
    """Reads a sentence, and scores every label for every word.

    Args:
        words, letters, labels: how many there are.
        options: those of `Reader`.
    """

    def __init__(self, words: int, letters: int, labels: int, **options: Any) -> None:
        super().__init__()
        self.reader = Reader(words, letters, **options)
        self.output = nn.Linear(self.reader.width, labels)

    def forward(self, text: Words) -> Tensor:
        """Scores (B, S, labels), before softmax."""
        out: Tensor = self.output(self.reader(text))
        return out
