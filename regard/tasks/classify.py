"""Classify: a label for a text, such as whether a review is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.components.summary import Summary
from regard.models.classifier import Classifier
from regard.tasks import tag
from regard.tasks.batch import deal
from regard.tasks.data import DataError, Labelled
from regard.tasks.task import Task, Tell, quiet
from regard.tasks.tokens import Tokens
from regard.tasks.words import learn_tokens, spell, words_of

_BATCH = 8192


@dataclass(frozen=True)
class Settings(tag.Settings):
    """What fixes the model: the same as of `tag`."""

    layers: int = 1
    dropout: float = 0.5


class Encoded(NamedTuple):
    """A text's words, and the number of its label."""

    words: list[str]
    label: int


class Classification(NamedTuple):
    """What the model makes of a text."""

    label: str
    chances: dict[str, float]  # of every label
    words: list[str]
    weights: Tensor  # (words,) how much the model looked at each, the mean of its heads


class Classify(Task):
    """A model that labels texts, and its vocabularies."""

    kind = "classify"
    settings_of = Settings
    settings: Settings

    @property
    def metric(self) -> str:
        """What is watched on the dev examples."""
        return "accuracy"

    @classmethod
    def learn_tokens(cls, settings: Settings, examples: Sequence[Labelled]) -> tuple[dict[str, Tokens], list[str]]:
        """Words, letters, and the labels that there are."""
        tokens = learn_tokens((words_of(one.text) for one in examples), settings.vocabulary, lowercase=True)
        return tokens, sorted({one.label for one in examples})

    def build(self) -> nn.Module:
        """The model that the settings ask for."""
        words, letters = len(self.tokens["words"]), len(self.tokens["letters"])
        return Classifier(words, letters, len(self.labels), **self.settings.options())

    def encode(self, examples: Sequence[Labelled]) -> list[Encoded]:
        """Labels as numbers, and texts as words."""
        numbers = {label: i for i, label in enumerate(self.labels)}
        for one in examples:
            if one.label not in numbers:
                known = ", ".join(map(repr, self.labels))
                raise DataError(f"{one.place}: the label {one.label!r} was not seen in training; it saw {known}")
        return [Encoded(words_of(one.text) or ["_"], numbers[one.label]) for one in examples]

    def size(self, encoded: Encoded) -> int:
        """Its words."""
        return len(encoded.words)

    def loss(self, batch: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Cross entropy of the labels."""
        scores = self.model(spell([one.words for one in batch], self.tokens))
        return F.cross_entropy(scores, torch.tensor([one.label for one in batch])), len(batch)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Labelled], tell: Tell = quiet) -> dict[str, float]:
        """The share of texts with the right label, in percent, and the mean of the labels' F1, each counted alike."""
        self.model.eval()
        encoded = self.encode(examples)
        counts = torch.zeros(len(self.labels), len(self.labels))  # right label, found label
        done = 0
        for batch in deal([self.size(one) for one in encoded], _BATCH):
            found = self.model(spell([encoded[i].words for i in batch], self.tokens)).argmax(-1)
            for i, best in zip(batch, found.tolist(), strict=True):
                counts[encoded[i].label, best] += 1
            done += len(batch)
            tell(done, len(encoded))
        right, there, said = counts.diag(), counts.sum(1), counts.sum(0)
        f1 = (2 * right / (there + said).clamp(min=1))[(there + said) > 0]
        return {"accuracy": 100.0 * float(right.sum() / counts.sum().clamp(min=1)), "F1": 100.0 * float(f1.mean())}

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[Classification]:
        """Label texts, and tell which words the model looked at."""
        self.model.eval()
        found = []
        for text in texts:
            words = words_of(text) or ["_"]
            scores, seen = self.model(spell([words], self.tokens), summary=Summary(full=True))
            chances = dict(zip(self.labels, scores[0].softmax(-1).tolist(), strict=True))
            weights = seen.full[0].flatten(0, -2).mean(0)
            found.append(Classification(max(chances, key=lambda label: chances[label]), chances, words, weights))
        return found
