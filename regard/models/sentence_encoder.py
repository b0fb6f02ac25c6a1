"""Sentence encoder: from the words of a sentence and their letters to one contextual vector per word."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.components import mask
from regard.components.position import sinusoidal
from regard.models.transformer import TransformerEncoder
from regard.nn.pooling import AttentionPooling
from regard.nn.recurrent import RecurrentEncoder

KINDS = ("recurrent", "transformer", "conv")
_UNKNOWN = 1  # index of words that are not in the vocabulary


class SentenceBatch(NamedTuple):
    """Padded batch of B sentences of at most S words, with U distinct words of at most W letters."""

    words: Tensor  # (B, S), word indices
    lengths: Tensor  # (B,), number of words of each sentence
    letters: Tensor  # (U, W), letter indices of each distinct word
    letter_lengths: Tensor  # (U,), number of letters of each distinct word
    spelled: Tensor  # (B, S), index of each word among the distinct words


class CharacterEncoder(nn.Module):
    """Word vectors from letters: a convolution over the letters of a word, followed by attention pooling.

    >>> encoder = CharacterEncoder(6, 8).eval()
    >>> letters = torch.tensor([[2, 3, 0, 0], [2, 3, 4, 5]])
    >>> vectors = encoder(letters, torch.tensor([2, 4]))
    >>> vectors.shape, torch.allclose(vectors[:1], encoder(letters[:1, :2], torch.tensor([2])), atol=1e-6)
    (torch.Size([2, 8]), True)

    Args:
        letters: number of letters.
        width: width of the vectors.
        dropout: dropout probability of the letter embeddings.

    Source: dos Santos and Zadrozny, "Learning Character-level Representations for Part-of-Speech Tagging" (2014),
    section 2.1.2, with attention pooling instead of max pooling.
    """

    def __init__(self, letters: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width // 2)
        self.convolution = nn.Conv1d(width // 2, width, 5, padding=2)
        self.pooling = AttentionPooling(width, num_heads=4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Encode words of letters (U, W) and lengths (U,) as vectors (U, width)."""
        real = torch.arange(letters.shape[1], device=letters.device) < lengths[:, None]
        # The convolution must not mix padding into the last letters.
        x = self.dropout(self.embedding(letters)) * real[..., None]
        x = F.relu(self.convolution(x.mT)).mT
        out: Tensor = self.pooling(x, mask=mask.lengths(lengths))
        return out


class SentenceEncoder(nn.Module):
    """Word embeddings concatenated with character-level vectors, followed by contextual layers.

    >>> text = SentenceBatch(torch.tensor([[2, 3, 2]]), torch.tensor([3]), torch.tensor([[2, 3], [4, 0]]),
    ...                      torch.tensor([2, 1]), torch.tensor([[0, 1, 0]]))
    >>> encoder = SentenceEncoder(5, 6, width=16).eval()
    >>> encoder(text).shape
    torch.Size([1, 3, 16])

    Args:
        words, letters: number of words and letters.
        kind: "recurrent" (bidirectional LSTM), "transformer" or "conv" (convolutions over five words).
        width: width of input and output vectors. Half of an input vector is a word embedding, half is computed from
            letters.
        layers: number of contextual layers.
        heads: number of heads of the transformer.
        dropout: dropout probability between the layers.
        unseen: probability in training that the word embedding is replaced by that of an unknown word.

    Source: Ling et al., "Finding Function in Form" (2015), for words and letters; the layers cite their own sources.
    """

    def __init__(
        self, words: int, letters: int, *, kind: str = "recurrent", width: int = 256, layers: int = 1, heads: int = 4,
        dropout: float = 0.3, unseen: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"SentenceEncoder: kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind, self.width, self.unseen = kind, width, unseen
        self.table = nn.Embedding(words, width // 2)
        nn.init.normal_(self.table.weight, std=0.1)
        self.spelling = CharacterEncoder(letters, width - width // 2, dropout)
        self.dropout = nn.Dropout(dropout)
        if kind == "recurrent":
            self.layers: nn.Module = RecurrentEncoder(width, width // 2, cell="lstm", layers=layers, dropout=dropout)
        elif kind == "transformer":
            self.layers = TransformerEncoder(width, heads, 2 * width, layers, dropout)
        else:
            self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 5, padding=2) for _ in range(layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, text: SentenceBatch) -> Tensor:
        """Return one vector per word, (B, S, width). Vectors beyond the length of a sentence are undefined."""
        words = text.words
        if self.training and self.unseen:
            unknown = torch.rand(words.shape, device=words.device) < self.unseen
            words = words.masked_fill(unknown, _UNKNOWN)
        spelled = F.embedding(text.spelled, self.spelling(text.letters, text.letter_lengths))
        x: Tensor = self.dropout(torch.cat([self.table(words), spelled], -1))
        if isinstance(self.layers, RecurrentEncoder):
            x = self.layers.read(x, text.lengths)
        elif self.kind == "transformer":
            x = self.layers(x + sinusoidal(x.shape[1], self.width).to(x), mask.lengths(text.lengths))
        else:
            real = (torch.arange(x.shape[1], device=x.device) < text.lengths[:, None])[..., None]
            for convolution, norm in zip(self.layers, self.norms, strict=True):  # type: ignore[call-overload]
                # Gated linear units: Dauphin et al. (2017), equation 1.
                x = norm(x + self.dropout(F.glu(convolution((x * real).mT).mT, -1)))
        out: Tensor = self.dropout(x)
        return out
