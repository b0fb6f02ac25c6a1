"""Sequence-to-sequence tasks, such as translation from English to German, or from letters to sounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import check, deprecated
from regard.models.beam import Hypothesis, beam_search
from regard.models.cross_entropy import cross_entropy
from regard.models.recurrent import Recurrent
from regard.models.transformer import Transformer
from regard.nn.cell import CellKind
from regard.tasks.batch import make_batches, pad
from regard.tasks.data import Pair
from regard.tasks.scripts import bleu_tokenizer
from regard.tasks.task import ProgressCallback, Task, ignore_progress
from regard.tasks.tokens import END, PAD, START, UNKNOWN, Tokens

# Maximum number of tokens that are decoded in one batch.
_BATCH = 4096


@dataclass(frozen=True)
class TranslateSettings:
    """Configuration of the model.

    Args:
        model: "transformer" or "recurrent".
        units: "pieces" (word pieces, with one vocabulary for both sides), or "symbols" (letters on the source side, and
            whitespace-separated symbols on the target side).
        vocabulary: maximum vocabulary size.
        width, heads, hidden, layers, dropout: as in `models.transformer.Transformer`; the recurrent model ignores `heads`.
        cell: "gru" or "lstm", for the recurrent model.
        smoothing: label smoothing, the probability mass of the other tokens.
    """

    model: str = "transformer"
    units: str = "pieces"
    vocabulary: int = 7500
    width: int = 256
    heads: int = 4
    hidden: int = 512
    layers: int = 3
    dropout: float = 0.2
    cell: CellKind = "gru"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        choices = {"model": ("transformer", "recurrent"), "units": ("pieces", "symbols"), "cell": get_args(CellKind)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise check.error(f"settings: {name}", getattr(self, name), " or ".join(map(repr, allowed)), True)
        for name in ("vocabulary", "width", "heads", "hidden", "layers"):
            check.integer(f"settings: {name}", getattr(self, name), 1)


class EncodedPair(NamedTuple):
    """The token IDs of a pair; each side ends with `END`."""

    source: list[int]
    target: list[int]


class Translation(NamedTuple):
    """The translation of a text."""

    text: str
    source: list[str]  # tokens of the source, including the end token
    target: list[str]  # tokens of the translation, without the end token
    numbers: list[int]  # token IDs of the translation
    weights: Tensor | None  # (len(target) + 1, len(source)), attention weights; the last row is that of the end token


class Translate(Task):
    """A sequence-to-sequence model and its vocabularies.

    >>> import pathlib
    >>> from regard.tasks.data import Pair
    >>> from regard.tasks.lines import Location
    >>> from regard.tasks.translate import Translate, TranslateSettings
    >>> pairs = [Pair("cab", "K AE B", Location(pathlib.Path("words.tsv"), 1))]
    >>> settings = TranslateSettings(model="recurrent", units="symbols", width=16, hidden=16, layers=1)
    >>> task = Translate.begin(settings, pairs)
    >>> task.encode(pairs)  # 3 is the end token
    [EncodedPair(source=[6, 4, 5, 3], target=[6, 4, 5, 3])]
    >>> prediction = task.predict(["bac"])[0]
    >>> prediction.source, prediction.weights.shape == (len(prediction.target) + 1, 4)
    (['b', 'a', 'c', '</s>'], True)
    """

    kind = "translate"
    settings_of = TranslateSettings
    settings: TranslateSettings
    model: Transformer | Recurrent

    @property
    def metric(self) -> str:
        """The metric that selects the best epoch."""
        return "BLEU" if self.settings.units == "pieces" else "word error"

    @property
    def fewer_is_better(self) -> bool:
        """Whether the metric is an error rate."""
        return self.settings.units == "symbols"

    @classmethod
    def packages(cls, settings: TranslateSettings) -> tuple[str, ...]:
        """Return the package that computes BLEU, if it is the metric."""
        return ("sacrebleu",) if settings.units == "pieces" else ()

    @classmethod
    def learn_tokens(cls, settings: TranslateSettings, examples: Sequence[Pair]) -> tuple[dict[str, Tokens], list[str]]:
        """Build one vocabulary of word pieces for both sides, or one of letters and one of symbols."""
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
        """Create the model."""
        s, sizes = self.settings, (len(self.source), len(self.target))
        shared = s.units == "pieces"
        if s.model == "recurrent":
            return Recurrent(
                *sizes, width=s.width, hidden=s.hidden, layers=s.layers, dropout=s.dropout, cell=s.cell, shared=shared
            )
        return Transformer(
            *sizes, width=s.width, heads=s.heads, hidden=s.hidden, layers=s.layers, dropout=s.dropout, shared=shared
        )

    def encode(self, examples: Sequence[Pair]) -> list[EncodedPair]:
        """Convert pairs to token IDs."""
        sources = self.source.encode_all([pair.source for pair in examples])
        targets = self.target.encode_all([pair.target for pair in examples])
        return [EncodedPair([*s, END], [*t, END]) for s, t in zip(sources, targets, strict=True)]

    def size(self, encoded: EncodedPair) -> int:
        """Return the length of the longer side."""
        return max(len(encoded.source), len(encoded.target))

    def loss(self, batch: Sequence[EncodedPair]) -> tuple[Tensor, int]:
        """Return the cross entropy of the next tokens, with label smoothing, and the number of tokens."""
        source, lengths = pad([pair.source for pair in batch])
        target, target_lengths = pad([pair.target for pair in batch])
        shifted = F.pad(target[:, :-1], (1, 0), value=START)
        hidden = self.model.hidden(source, lengths, shifted)
        # Logits over the vocabulary are most of the work, so they are not computed for padding.
        is_token = torch.arange(target.shape[1]) < target_lengths[:, None]
        loss = cross_entropy(hidden[is_token], self.model.target.weight, target[is_token], self.settings.smoothing)
        return loss, int(is_token.sum())

    def evaluate(
        self, examples: Sequence[Pair], tell: ProgressCallback = ignore_progress, beams: int = 1
    ) -> dict[str, float]:
        """Return BLEU and chrF of sacrebleu, cased and detokenized, with the tokenizer of `bleu_tokenizer`; or, for symbols,
        the percentages of wrong sequences and of symbol edits.
        """
        hypotheses = self._search([pair.source for pair in examples], beams, tell)
        texts = [self.target.decode(hypothesis.tokens) for hypothesis in hypotheses]
        references = [pair.target for pair in examples]
        if self.settings.units == "symbols":
            return _error_rates(texts, references)
        try:
            import sacrebleu
        except ImportError as error:
            raise ImportError("BLEU needs the package sacrebleu: pip install 'regard[tasks]'") from error
        tokenizer = bleu_tokenizer(references)
        return {
            "BLEU": float(sacrebleu.corpus_bleu(texts, [references], tokenize=tokenizer).score),
            "chrF": float(sacrebleu.corpus_chrf(texts, [references]).score),
        }

    def predict(
        self, texts: Sequence[str], beams: int = 5, align: bool = True, tell: ProgressCallback = ignore_progress
    ) -> list[Translation]:
        """Translate texts by beam search. With `align`, the translations have attention weights."""
        hypotheses = self._search(texts, beams, tell)
        return [self._translation(text, h.tokens, align) for text, h in zip(texts, hypotheses, strict=True)]

    @torch.no_grad()
    def _translation(self, text: str, tokens: list[int], align: bool) -> Translation:
        inputs = self.inputs(text, tokens)
        weights = self.model.align(*inputs)[0] if align else None
        names = self.source.names(inputs[0][0].tolist()), self.target.names(tokens)
        return Translation(self.target.decode(tokens), *names, tokens, weights)

    def inputs(self, text: str, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs with which the model predicts the L tokens of a translation: source (1, S), its length (1,), and
        target (1, L + 1).
        """
        source = [*self.source.encode(text), END]
        return torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[START, *tokens]])

    @torch.no_grad()
    def _search(self, texts: Sequence[str], beams: int, tell: ProgressCallback) -> list[Hypothesis]:
        """Return the best hypothesis for each text."""
        self.model.eval()
        encoded = [[*ids, END] for ids in self.source.encode_all(texts)]
        hypotheses: list[Hypothesis] = [Hypothesis([], 0.0)] * len(texts)
        done = 0
        for batch in make_batches([len(row) for row in encoded], max(_BATCH // beams, 1)):
            source, lengths = pad([encoded[i] for i in batch])
            state = self.model.start(source, lengths)
            best = beam_search(self._step, state, 2 * lengths + 10, start=START, end=END, beams=beams)
            for i, row in zip(batch, best, strict=True):
                hypotheses[i] = row[0]
            done += len(batch)
            tell(done, len(texts))
        return hypotheses

    def _step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run one decoding step of the model, in which padding, unknown and start tokens have probability 0."""
        scores, state = self.model.step(tokens, state)
        scores[:, [PAD, UNKNOWN, START]] = -torch.inf
        return scores, state


def _error_rates(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the percentages of wrong sequences, and of symbol edits relative to the length of the references."""
    pairs = [(text.split(), reference.split()) for text, reference in zip(texts, references, strict=True)]
    edits = sum(_edit_distance(a, b) for a, b in pairs)
    return {
        "word error": 100.0 * sum(a != b for a, b in pairs) / max(len(pairs), 1),
        "symbol error": 100.0 * edits / max(sum(len(b) for _, b in pairs), 1),
    }


def _edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the minimum number of insertions, deletions and substitutions (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


__getattr__ = deprecated.getter("regard.tasks.translate")
