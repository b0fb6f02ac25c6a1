"""Translate: from one sequence to another, such as from English to German, or from letters to sounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import check
from regard.models.beam import Found, search
from regard.models.cross_entropy import cross_entropy
from regard.models.recurrent import Recurrent
from regard.models.transformer import Transformer
from regard.nn.cell import Kind
from regard.tasks.batch import deal, pad
from regard.tasks.data import Pair
from regard.tasks.task import Task, Tell, quiet
from regard.tasks.tokens import END, PAD, START, UNKNOWN, Tokens

# How many tokens of source and of target are decoded side by side.
_BATCH = 4096


@dataclass(frozen=True)
class Settings:
    """What fixes the model.

    Args:
        model: "transformer" or "recurrent".
        units: "pieces" of words, one vocabulary for both sides; or "symbols": letters on the source side, and what white
            space divides on the target side.
        vocabulary: how many pieces there are at most.
        width, heads, hidden, layers, dropout: as in `models.Transformer`; the recurrent model takes no heads.
        cell: "gru" or "lstm", of the recurrent model.
        smoothing: of the labels: what the other tokens get of each.
    """

    model: str = "transformer"
    units: str = "pieces"
    vocabulary: int = 7500
    width: int = 256
    heads: int = 4
    hidden: int = 512
    layers: int = 3
    dropout: float = 0.2
    cell: Kind = "gru"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        words = {"model": ("transformer", "recurrent"), "units": ("pieces", "symbols"), "cell": get_args(Kind)}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise check.wrong(f"settings: {name}", getattr(self, name), " or ".join(map(repr, known)), True)
        for name in ("vocabulary", "width", "heads", "hidden", "layers"):
            check.whole(f"settings: {name}", getattr(self, name), 1)


class Encoded(NamedTuple):
    """A pair as numbers; each side with the token that ends it."""

    source: list[int]
    target: list[int]


class Translation(NamedTuple):
    """What the model makes of a text."""

    text: str
    source: list[str]  # its tokens, the end included
    target: list[str]  # those of the translation
    numbers: list[int]  # and their numbers
    weights: Tensor | None  # (target, source): how much each token looked at each source token; the last is the end's


class Translate(Task):
    """A model that translates, and its vocabularies."""

    kind = "translate"
    settings_of = Settings
    settings: Settings
    model: Transformer | Recurrent

    @property
    def metric(self) -> str:
        """What is watched on the dev examples."""
        return "BLEU" if self.settings.units == "pieces" else "word error"

    @property
    def fewer_is_better(self) -> bool:
        """Is it an error?"""
        return self.settings.units == "symbols"

    @classmethod
    def packages(cls, settings: Settings) -> tuple[str, ...]:
        """What BLEU comes from."""
        return ("sacrebleu",) if settings.units == "pieces" else ()

    @classmethod
    def learn_tokens(cls, settings: Settings, examples: Sequence[Pair]) -> tuple[dict[str, Tokens], list[str]]:
        """One vocabulary of pieces for both sides, or one of letters and one of symbols."""
        if settings.units == "pieces":
            texts = (text for pair in examples for text in (pair.source, pair.target))
            return {"tokens": Tokens.pieces(texts, settings.vocabulary)}, []
        source = Tokens.letters(pair.source for pair in examples)
        return {"source": source, "target": Tokens.words((pair.target for pair in examples), settings.vocabulary)}, []

    @property
    def source(self) -> Tokens:
        """The vocabulary of the source side."""
        return self.tokens["tokens" if self.settings.units == "pieces" else "source"]

    @property
    def target(self) -> Tokens:
        """The vocabulary of the target side."""
        return self.tokens["tokens" if self.settings.units == "pieces" else "target"]

    def build(self) -> Transformer | Recurrent:
        """The model that the settings ask for."""
        s, sizes = self.settings, (len(self.source), len(self.target))
        shared = s.units == "pieces"
        if s.model == "recurrent":
            return Recurrent(
                *sizes, width=s.width, hidden=s.hidden, layers=s.layers, dropout=s.dropout, cell=s.cell, shared=shared
            )
        return Transformer(
            *sizes, width=s.width, heads=s.heads, hidden=s.hidden, layers=s.layers, dropout=s.dropout, shared=shared
        )

    def encode(self, examples: Sequence[Pair]) -> list[Encoded]:
        """Pairs as numbers."""
        sources = self.source.encode_all([pair.source for pair in examples])
        targets = self.target.encode_all([pair.target for pair in examples])
        return [Encoded([*s, END], [*t, END]) for s, t in zip(sources, targets, strict=True)]

    def size(self, encoded: Encoded) -> int:
        """The longer of the two sides."""
        return max(len(encoded.source), len(encoded.target))

    def loss(self, batch: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Cross entropy of the next token, with smoothed labels."""
        source, lengths = pad([pair.source for pair in batch])
        target, real = pad([pair.target for pair in batch])
        given = F.pad(target[:, :-1], (1, 0), value=START)
        hidden = self.model.hidden(source, lengths, given)
        # Scores of the whole vocabulary are most of the work: none for padding.
        kept = torch.arange(target.shape[1]) < real[:, None]
        loss = cross_entropy(hidden[kept], self.model.target.weight, target[kept], self.settings.smoothing)
        return loss, int(kept.sum())

    def evaluate(self, examples: Sequence[Pair], tell: Tell = quiet, beams: int = 1) -> dict[str, float]:
        """BLEU and chrF of sacrebleu, cased and detokenised; or, of symbols, the share of sequences that are not as they
        should be, and the share of symbols to change, in percent.
        """
        texts = [self.target.decode(found.tokens) for found in self._search([p.source for p in examples], beams, tell)]
        wanted = [pair.target for pair in examples]
        if self.settings.units == "symbols":
            return _errors(texts, wanted)
        try:
            import sacrebleu
        except ImportError as error:
            raise ImportError("BLEU needs the package sacrebleu: pip install 'regard[tasks]'") from error
        return {
            "BLEU": float(sacrebleu.corpus_bleu(texts, [wanted]).score),
            "chrF": float(sacrebleu.corpus_chrf(texts, [wanted]).score),
        }

    def predict(
        self, texts: Sequence[str], beams: int = 5, align: bool = True, tell: Tell = quiet
    ) -> list[Translation]:
        """Translate texts; with `align`, tell which source tokens each target token looked at."""
        found = self._search(texts, beams, tell)
        return [self._told(text, one.tokens, align) for text, one in zip(texts, found, strict=True)]

    @torch.no_grad()
    def _told(self, text: str, tokens: list[int], align: bool) -> Translation:
        given = self.inputs(text, tokens)
        weights = self.model.align(*given)[0] if align else None
        names = self.source.names(given[0][0].tolist()), self.target.names(tokens)
        return Translation(self.target.decode(tokens), *names, tokens, weights)

    def inputs(self, text: str, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is called with to make these tokens of a text: source (1, S), its length, target (1, L + 1)."""
        source = [*self.source.encode(text), END]
        return torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[START, *tokens]])

    @torch.no_grad()
    def _search(self, texts: Sequence[str], beams: int, tell: Tell) -> list[Found]:
        """The most likely translation of each text."""
        self.model.eval()
        encoded = [[*numbers, END] for numbers in self.source.encode_all(texts)]
        found: list[Found] = [Found([], 0.0)] * len(texts)
        done = 0
        for batch in deal([len(row) for row in encoded], max(_BATCH // beams, 1)):
            source, lengths = pad([encoded[i] for i in batch])
            state = self.model.start(source, lengths)
            best = search(self._step, state, 2 * lengths + 10, start=START, end=END, beams=beams)
            for i, row in zip(batch, best, strict=True):
                found[i] = row[0]
            done += len(batch)
            tell(done, len(texts))
        return found

    def _step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A step of the model, which says nothing that is no text."""
        scores, state = self.model.step(tokens, state)
        scores[:, [PAD, UNKNOWN, START]] = -torch.inf
        return scores, state


def _errors(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Sequences of symbols that are not as they should be, and symbols to change."""
    pairs = [(text.split(), right.split()) for text, right in zip(texts, wanted, strict=True)]
    changes = sum(_distance(a, b) for a, b in pairs)
    return {
        "word error": 100.0 * sum(a != b for a, b in pairs) / max(len(pairs), 1),
        "symbol error": 100.0 * changes / max(sum(len(b) for _, b in pairs), 1),
    }


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """How many symbols must be put in, left out or changed: Levenshtein (1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
