"""A reader: from the words of a sentence, and their letters, to a vector a word that knows of the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.components import mask
from regard.components.position import sinusoidal
from regard.models.transformer import Encoder
from regard.nn.pooling import AttentionPooling
from regard.nn.recurrent import RecurrentEncoder

KINDS = ("recurrent", "transformer", "conv")
_UNKNOWN = 1  # the number of a word that is in no vocabulary


class Words(NamedTuple):
    """Sentences side by side. B sentences of at most S words; U different words of at most W letters among them."""

    words: Tensor  # (B, S)
    lengths: Tensor  # (B,) words of each sentence
    letters: Tensor  # (U, W) of each different word
    letter_lengths: Tensor  # (U,)
    spelled: Tensor  # (B, S) which of the different words each word is


class Spelling(nn.Module):
    """A vector from the letters of a word: a convolution over them, and what attention picks of it.

    Args:
        letters: how many letters there are. width: of the vector.
        dropout: of the vectors of letters.

    Source: dos Santos and Zadrozny, "Learning Character-level Representations for Part-of-Speech Tagging" (2014), section
    2.1.2, with attention where it takes the largest.
    """

    def __init__(self, letters: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width // 2)
        self.convolution = nn.Conv1d(width // 2, width, 5, padding=2)
        self.pooling = AttentionPooling(width, num_heads=4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Words of letters (U, W) with their lengths (U,), as vectors (U, width)."""
        real = torch.arange(letters.shape[1], device=letters.device) < lengths[:, None]
        # Padding must not reach the last letters through the convolution.
        x = self.dropout(self.embedding(letters)) * real[..., None]
        x = F.relu(self.convolution(x.mT)).mT
        out: Tensor = self.pooling(x, mask=mask.lengths(lengths))
        return out


class Reader(nn.Module):
    """Words and their letters as vectors, and layers that read them together.

    Args:
        words, letters: how many there are.
        kind: "recurrent" (two directions of an LSTM), "transformer" or "conv" (convolutions over five words).
        width: of a word's vector, half of it from a table and half from its letters; and of what comes out.
        layers: of the reader. heads: of the transformer's attention.
        dropout: between the layers. unseen: the chance that in training a word is known by its letters alone.

    Source: Ling et al., "Finding Function in Form" (2015), for words and letters side by side; the layers name their own.
    """

    def __init__(
        self, words: int, letters: int, *, kind: str = "recurrent", width: int = 256, layers: int = 1, heads: int = 4,
        dropout: float = 0.3, unseen: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Reader: kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind, self.width, self.unseen = kind, width, unseen
        self.table = nn.Embedding(words, width // 2)
        nn.init.normal_(self.table.weight, std=0.1)
        self.spelling = Spelling(letters, width - width // 2, dropout)
        self.dropout = nn.Dropout(dropout)
        if kind == "recurrent":
            self.layers: nn.Module = RecurrentEncoder(width, width // 2, cell="lstm", layers=layers, dropout=dropout)
        elif kind == "transformer":
            self.layers = Encoder(width, heads, 2 * width, layers, dropout)
        else:
            self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 5, padding=2) for _ in range(layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, text: Words) -> Tensor:
        """Vectors (B, S, width), one a word; what stands beyond a sentence's length means nothing."""
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
                # Gated, so that a word may pass unchanged: Dauphin et al. (2017), equation 1.
                x = norm(x + self.dropout(F.glu(convolution((x * real).mT).mT, -1)))
        out: Tensor = self.dropout(x)
        return out
