"""Text classification, such as the sentiment of reviews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import deprecated
from regard.components.summary import Summary
from regard.models.classifier import Classifier
from regard.tasks.batch import make_batches
from regard.tasks.data import Labeled
from regard.tasks.labels import check_variety, expect_known, index_labels, normalize_label, quote, remark_on_labels
from regard.tasks.lines import DataError
from regard.tasks.split import split_by_label
from regard.tasks.tag import TagSettings
from regard.tasks.task import ProgressCallback, Task, ignore_progress, most_frequent
from regard.tasks.tokens import Tokens
from regard.tasks.words import learn_tokens, remark_on_words, spell, words_of

_BATCH = 8192


@dataclass(frozen=True)
class ClassifySettings(TagSettings):
    """Configuration of the model, with the fields of `TagSettings`."""

    layers: int = 1
    dropout: float = 0.5


class EncodedText(NamedTuple):
    """The words of a text, and the index of its label."""

    words: list[str]
    label: int


class Classification(NamedTuple):
    """The prediction for a text."""

    label: str
    chances: dict[str, float]  # probability of every label
    words: list[str]
    weights: Tensor  # (words,), the attention weight of each word, averaged over heads


class Classify(Task):
    """A text classifier and its vocabularies.

    >>> import pathlib
    >>> from regard.tasks.classify import Classify, ClassifySettings
    >>> from regard.tasks.data import Labeled
    >>> from regard.tasks.lines import Location
    >>> reviews = [Labeled("A good film.", "+", Location(pathlib.Path("reviews.tsv"), 1))]
    >>> task = Classify.begin(ClassifySettings(width=16, heads=2), reviews)
    >>> task.encode(reviews)
    [EncodedText(words=['A', 'good', 'film', '.'], label=0)]
    >>> task.predict(["A bad film"])[0].weights.sum().round(decimals=4)
    tensor(1.)
    """

    kind = "classify"
    settings_of = ClassifySettings
    settings: ClassifySettings

    @property
    def metric(self) -> str:
        """The metric that selects the best epoch."""
        return "accuracy"

    def chance(self, examples: Sequence[Labeled]) -> tuple[float, str]:
        """Return the accuracy of the most frequent label, and this label."""
        return most_frequent(example.label for example in examples)

    @classmethod
    def check(cls, examples: Sequence[Labeled]) -> None:
        """Raise a DataError unless there are two labels."""
        super().check(examples)
        check_variety([example.label for example in examples], "label", "example")

    @classmethod
    def hold_out(cls, examples: Sequence[Labeled], share: float, seed: int = 0) -> list[list[Labeled]]:
        """Split examples into training and dev examples, in which each label has the same fraction."""
        return split_by_label(examples, [example.label for example in examples], share, seed)

    @classmethod
    def remarks(cls, examples: Sequence[Labeled], dev: Sequence[Labeled]) -> list[str]:
        """Return remarks on rare and misspelled labels, and on dev examples that are training examples."""
        return [*remark_on_labels([example.label for example in examples]), *super().remarks(examples, dev)]

    @classmethod
    def learn_tokens(
        cls, settings: ClassifySettings, examples: Sequence[Labeled]
    ) -> tuple[dict[str, Tokens], list[str]]:
        """Return the vocabularies of words and letters, and the labels."""
        tokens = learn_tokens((words_of(example.text) for example in examples), settings.vocabulary, lowercase=True)
        return tokens, sorted({example.label for example in examples})

    def remarks_on_texts(self, texts: Sequence[str]) -> list[str]:
        """Return remarks on unknown letters and words."""
        return remark_on_words(texts, self.tokens)

    def build(self) -> nn.Module:
        """Create the model."""
        words, letters = len(self.tokens["words"]), len(self.tokens["letters"])
        return Classifier(words, letters, len(self.labels), **self.settings.options())

    def encode(self, examples: Sequence[Labeled]) -> list[EncodedText]:
        """Split texts into words, and convert labels to indices."""
        index = index_labels(self.labels)
        unknown = list(dict.fromkeys(example.label for example in examples if example.label not in index))
        if unknown:
            example = next(example for example in examples if example.label == unknown[0])
            swap = "; are the columns swapped?" if normalize_label(example.text) in index else ""
            raise DataError(
                f"{example.place}: label is {quote(example.label)}; {expect_known(self.labels, unknown[1:])}{swap}"
            )
        return [EncodedText(words_of(example.text) or ["_"], index[example.label]) for example in examples]

    def size(self, encoded: EncodedText) -> int:
        """Return the number of words."""
        return len(encoded.words)

    def loss(self, batch: Sequence[EncodedText]) -> tuple[Tensor, int]:
        """Return the cross entropy of the labels, and the number of texts."""
        scores = self.model(spell([text.words for text in batch], self.tokens))
        return F.cross_entropy(scores, torch.tensor([text.label for text in batch])), len(batch)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Labeled], tell: ProgressCallback = ignore_progress) -> dict[str, float]:
        """Return the accuracy and the macro-averaged F1 score, in percent."""
        self.model.eval()
        encoded = self.encode(examples)
        confusion = torch.zeros(len(self.labels), len(self.labels), dtype=torch.long)  # [true label, predicted label]
        done = 0
        for batch in make_batches([self.size(text) for text in encoded], _BATCH):
            predicted = self.model(spell([encoded[i].words for i in batch], self.tokens)).argmax(-1)
            for i, label in zip(batch, predicted.tolist(), strict=True):
                confusion[encoded[i].label, label] += 1
            done += len(batch)
            tell(done, len(encoded))
        correct, actual, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        f1 = (2 * correct / (actual + predicted).clamp(min=1))[(actual + predicted) > 0]
        accuracy = 100.0 * int(correct.sum()) / max(len(encoded), 1)
        return {"accuracy": accuracy, "F1": 100.0 * float(f1.mean())}

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[Classification]:
        """Classify texts. Each prediction has the attention weights of the words."""
        self.model.eval()
        predictions = []
        for text in texts:
            words = words_of(text) or ["_"]
            scores, summary = self.model(spell([words], self.tokens), summary=Summary(full=True))
            chances = dict(zip(self.labels, scores[0].softmax(-1).tolist(), strict=True))
            weights = summary.full[0].flatten(0, -2).mean(0)
            predictions.append(Classification(max(chances, key=lambda label: chances[label]), chances, words, weights))
        return predictions


__getattr__ = deprecated.getter("regard.tasks.classify")
