"""Sequence labeling: one label per word, such as its part of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check, deprecated
from regard.models.sentence_encoder import KINDS
from regard.models.tagger import Tagger
from regard.tasks.batch import make_batches
from regard.tasks.data import Tagged
from regard.tasks.labels import check_variety, expect_known, index_labels, quote
from regard.tasks.lines import DataError
from regard.tasks.split import return_unknown
from regard.tasks.task import ProgressCallback, Task, ignore_progress, most_frequent
from regard.tasks.tokens import Tokens
from regard.tasks.words import learn_tokens, remark_on_words, spell, words_of

_BATCH = 8192


@dataclass(frozen=True)
class TagSettings:
    """Configuration of a `models.sentence_encoder.SentenceEncoder`, in which at most `vocabulary` words have embeddings."""

    model: str = "recurrent"
    vocabulary: int = 20_000
    width: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.4

    def __post_init__(self) -> None:
        if self.model not in KINDS:
            raise check.error("settings: model", self.model, " or ".join(map(repr, KINDS)), True)
        for name in ("vocabulary", "width", "layers", "heads"):
            check.integer(f"settings: {name}", getattr(self, name), 1)

    def options(self) -> dict[str, object]:
        """Return the keyword arguments of `models.sentence_encoder.SentenceEncoder`."""
        shape = {"width": self.width, "layers": self.layers, "heads": self.heads}
        return {"kind": self.model, "dropout": self.dropout, **shape}


class EncodedSentence(NamedTuple):
    """The words of a sentence, and the index of each word's label."""

    words: list[str]
    labels: list[int]


class Tagging(NamedTuple):
    """The words of a sentence, and the label of each word with its probability (`chances`)."""

    words: list[str]
    tags: list[str]
    chances: list[float]


class Tag(Task):
    """A sequence labeling model and its vocabularies.

    >>> import pathlib
    >>> from regard.tasks.data import Tagged
    >>> from regard.tasks.lines import Location
    >>> from regard.tasks.tag import Tag, TagSettings
    >>> sentences = [Tagged(["I", "see"], ["PRON", "VERB"], Location(pathlib.Path("train.conllu"), 1))]
    >>> task = Tag.begin(TagSettings(width=16, heads=2), sentences)
    >>> task.encode(sentences)
    [EncodedSentence(words=['I', 'see'], labels=[0, 1])]
    >>> task.predict(["I don't see"])[0].words
    ['I', 'do', "n't", 'see']
    """

    kind = "tag"
    settings_of = TagSettings
    settings: TagSettings

    @property
    def metric(self) -> str:
        """The metric that selects the best epoch."""
        return "accuracy"

    @property
    def attends_to_words(self) -> bool:
        """Whether the model is a transformer. The others attend to the letters of unknown words only."""
        return self.settings.model == "transformer"

    def chance(self, examples: Sequence[Tagged]) -> tuple[float, str]:
        """Return the accuracy of the most frequent tag, and this tag."""
        return most_frequent(tag for example in examples for tag in example.tags)

    @classmethod
    def check(cls, examples: Sequence[Tagged]) -> None:
        """Raise a DataError unless there are two tags."""
        super().check(examples)
        check_variety([tag for example in examples for tag in example.tags], "tag", "word")

    @classmethod
    def hold_out(cls, examples: Sequence[Tagged], share: float, seed: int = 0) -> list[list[Tagged]]:
        """Split examples into training and dev examples, whose tags all occur in training."""
        rest, dev = super().hold_out(examples, share, seed)
        return return_unknown(rest, dev, lambda example: example.tags)

    @classmethod
    def learn_tokens(cls, settings: TagSettings, examples: Sequence[Tagged]) -> tuple[dict[str, Tokens], list[str]]:
        """Return the vocabularies of words and letters, and the tags."""
        tokens = learn_tokens((example.words for example in examples), settings.vocabulary, lowercase=False)
        return tokens, sorted({tag for example in examples for tag in example.tags})

    def remarks_on_texts(self, texts: Sequence[str]) -> list[str]:
        """Return remarks on unknown letters and words."""
        return remark_on_words(texts, self.tokens)

    def build(self) -> nn.Module:
        """Create the model."""
        words, letters = len(self.tokens["words"]), len(self.tokens["letters"])
        return Tagger(words, letters, len(self.labels), **self.settings.options())

    def encode(self, examples: Sequence[Tagged]) -> list[EncodedSentence]:
        """Convert tags to indices."""
        index = index_labels(self.labels)
        tags = dict.fromkeys(tag for example in examples for tag in example.tags)
        unknown = [tag for tag in tags if tag not in index]
        if unknown:
            example = next(example for example in examples if unknown[0] in example.tags)
            word = example.words[example.tags.index(unknown[0])]
            expected = expect_known(self.labels, unknown[1:])
            raise DataError(f"{example.place}: tag of {quote(word)} is {quote(unknown[0])}; {expected}")
        return [EncodedSentence(example.words, [index[tag] for tag in example.tags]) for example in examples]

    def size(self, encoded: EncodedSentence) -> int:
        """Return the number of words."""
        return len(encoded.words)

    def loss(self, batch: Sequence[EncodedSentence]) -> tuple[Tensor, int]:
        """Return the cross entropy of the tags, and the number of words."""
        scores = self._scores([sentence.words for sentence in batch])
        labels = torch.tensor([label for sentence in batch for label in sentence.labels])
        return F.cross_entropy(scores, labels), len(labels)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Tagged], tell: ProgressCallback = ignore_progress) -> dict[str, float]:
        """Return the percentages of words with the correct tag, and of sentences in which all words have it."""
        self.model.eval()
        encoded = self.encode(examples)
        correct_words = words = correct_sentences = done = 0
        for batch in make_batches([self.size(sentence) for sentence in encoded], _BATCH):
            sentences = [encoded[i] for i in batch]
            scores = self._scores([sentence.words for sentence in sentences])
            predictions = torch.split(scores.argmax(-1), [len(sentence.words) for sentence in sentences])
            for sentence, predicted in zip(sentences, predictions, strict=True):
                correct = int((predicted == torch.tensor(sentence.labels)).sum())
                correct_words += correct
                words += len(sentence.words)
                correct_sentences += correct == len(sentence.words)
            done += len(batch)
            tell(done, len(encoded))
        return {
            "accuracy": 100.0 * correct_words / max(words, 1),
            "sentences": 100.0 * correct_sentences / max(len(encoded), 1),
        }

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[Tagging]:
        """Split texts into words, and tag these."""
        self.model.eval()
        sentences = [words_of(text) for text in texts]
        predictions = []
        for words in sentences:
            chances, tags = (
                self._scores([words]).softmax(-1).max(-1) if words else (torch.empty(0), torch.empty(0).long())
            )
            predictions.append(Tagging(words, [self.labels[tag] for tag in tags.tolist()], chances.tolist()))
        return predictions

    def _scores(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Return the scores of the words of all sentences, concatenated: (N, labels)."""
        text = spell(sentences, self.tokens)
        is_word = torch.arange(text.words.shape[1]) < text.lengths[:, None]
        scores: Tensor = self.model(text)[is_word]
        return scores


__getattr__ = deprecated.getter("regard.tasks.tag")
