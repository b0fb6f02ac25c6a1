"""Sequence tagger."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.models.sentence_encoder import SentenceBatch, SentenceEncoder


class Tagger(nn.Module):
    """Sequence tagger: a `SentenceEncoder` and a linear layer that computes the logits of the labels of each word.

    Args:
        words, letters, labels: number of words, letters and labels.
        options: options of `SentenceEncoder`.

    >>> text = SentenceBatch(torch.tensor([[2, 3, 2]]), torch.tensor([3]), torch.tensor([[2, 3], [4, 0]]),
    ...                      torch.tensor([2, 1]), torch.tensor([[0, 1, 0]]))
    >>> Tagger(5, 6, 4, width=16, kind="conv")(text).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, words: int, letters: int, labels: int, **options: Any) -> None:
        super().__init__()
        self.reader = SentenceEncoder(words, letters, **options)
        self.output = nn.Linear(self.reader.width, labels)

    def forward(self, text: SentenceBatch) -> Tensor:
        """Return logits (B, S, labels)."""
        out: Tensor = self.output(self.reader(text))
        return out
