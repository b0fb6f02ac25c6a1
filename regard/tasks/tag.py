"""Tag: a label for every word of a sentence, such as its part of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.models.reader import KINDS
from regard.models.tagger import Tagger
from regard.tasks.batch import deal
from regard.tasks.data import DataError, Tagged
from regard.tasks.task import Task, Tell, quiet
from regard.tasks.tokens import Tokens
from regard.tasks.words import learn_tokens, spell, words_of

_BATCH = 8192


@dataclass(frozen=True)
class Settings:
    """What fixes the model: see `models.Reader`, which these describe. `vocabulary` is how many words have a vector of their
    own at most.
    """

    model: str = "recurrent"
    vocabulary: int = 20_000
    width: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.4

    def __post_init__(self) -> None:
        if self.model not in KINDS:
            raise check.wrong("settings: model", self.model, " or ".join(map(repr, KINDS)), True)
        for name in ("vocabulary", "width", "layers", "heads"):
            check.whole(f"settings: {name}", getattr(self, name), 1)

    def options(self) -> dict[str, object]:
        """What `models.Reader` is told."""
        shape = {"width": self.width, "layers": self.layers, "heads": self.heads}
        return {"kind": self.model, "dropout": self.dropout, **shape}


class Encoded(NamedTuple):
    """A sentence, and the number of each word's label."""

    words: list[str]
    labels: list[int]


class Tagging(NamedTuple):
    """A sentence, the label of each word, and how sure the model is of it."""

    words: list[str]
    tags: list[str]
    chances: list[float]


class Tag(Task):
    """A model that labels words, and its vocabularies."""

    kind = "tag"
    settings_of = Settings
    settings: Settings

    @property
    def metric(self) -> str:
        """What is watched on the dev examples."""
        return "accuracy"

    @classmethod
    def learn_tokens(cls, settings: Settings, examples: Sequence[Tagged]) -> tuple[dict[str, Tokens], list[str]]:
        """Words, letters, and the tags that there are."""
        tokens = learn_tokens((one.words for one in examples), settings.vocabulary, lowercase=False)
        return tokens, sorted({tag for one in examples for tag in one.tags})

    def build(self) -> nn.Module:
        """The model that the settings ask for."""
        words, letters = len(self.tokens["words"]), len(self.tokens["letters"])
        return Tagger(words, letters, len(self.labels), **self.settings.options())

    def encode(self, examples: Sequence[Tagged]) -> list[Encoded]:
        """Tags as numbers."""
        numbers = {label: i for i, label in enumerate(self.labels)}
        for one in examples:
            for word, tag in zip(one.words, one.tags, strict=True):
                if tag not in numbers:
                    known = ", ".join(self.labels)
                    raise DataError(
                        f"{one.place}: {word!r} has the tag {tag!r}, which training did not see; it saw {known}"
                    )
        return [Encoded(one.words, [numbers[tag] for tag in one.tags]) for one in examples]

    def size(self, encoded: Encoded) -> int:
        """Its words."""
        return len(encoded.words)

    def loss(self, batch: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Cross entropy of the tags."""
        scores = self._scores([one.words for one in batch])
        labels = torch.tensor([label for one in batch for label in one.labels])
        return F.cross_entropy(scores, labels), len(labels)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Tagged], tell: Tell = quiet) -> dict[str, float]:
        """The share of words with the right tag, and of sentences in which every word has it, in percent."""
        self.model.eval()
        encoded = self.encode(examples)
        right = words = whole = done = 0
        for batch in deal([self.size(one) for one in encoded], _BATCH):
            picked = [encoded[i] for i in batch]
            best = torch.split(
                self._scores([one.words for one in picked]).argmax(-1), [len(one.words) for one in picked]
            )
            for one, found in zip(picked, best, strict=True):
                same = int((found == torch.tensor(one.labels)).sum())
                right, words, whole = right + same, words + len(one.words), whole + (same == len(one.words))
            done += len(batch)
            tell(done, len(encoded))
        return {"accuracy": 100.0 * right / max(words, 1), "sentences": 100.0 * whole / max(len(encoded), 1)}

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[Tagging]:
        """Tag the words of texts."""
        self.model.eval()
        sentences = [words_of(text) for text in texts]
        found = []
        for words in sentences:
            chances, tags = (
                self._scores([words]).softmax(-1).max(-1) if words else (torch.empty(0), torch.empty(0).long())
            )
            found.append(Tagging(words, [self.labels[tag] for tag in tags.tolist()], chances.tolist()))
        return found

    def _scores(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Scores of all words, one sentence after the other: (N, labels)."""
        text = spell(sentences, self.tokens)
        real = torch.arange(text.words.shape[1]) < text.lengths[:, None]
        scores: Tensor = self.model(text)[real]
        return scores
