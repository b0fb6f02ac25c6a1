"""Synthetic examples of tasks that a small model learns in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from regard.tasks.data import Labeled, Pair, Tagged
from regard.tasks.lines import Location

NOWHERE = Location(Path("made"), 1)


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Return sequences of letters, and the reversed sequences in capitals."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcd", k=rng.randint(2, 5))) for _ in range(count)]
    return [Pair(word, " ".join(word[::-1].upper()), NOWHERE) for word in words]


def sentences(count: int, seed: int = 0) -> list[Tagged]:
    """Return words whose ending determines the tag, except that a word in "es" after "zu" is a verb."""
    rng, endings = random.Random(seed), {"ung": "NOUN", "en": "VERB", "ig": "ADJ", "es": "PRON"}
    examples = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(rng.randint(2, 7)):
            ending = rng.choice(list(endings))
            after = rng.random() < 0.3
            words += [*(["zu"] if after else []), "".join(rng.choices("bdfgkl", k=3)) + ending]
            tags += [*(["PART"] if after else []), "VERB" if after and ending == "es" else endings[ending]]
        examples.append(Tagged(words, tags, NOWHERE))
    return examples


def reviews(count: int, seed: int = 0) -> list[Labeled]:
    """Return reviews whose label is determined by the word after "but"."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        good = rng.random() < 0.5
        filler = " ".join(rng.choices(["the", "film", "plot", "was", "a"], k=rng.randint(1, 5)))
        first, last = ("bad", "good") if good else ("good", "bad")
        examples.append(Labeled(f"{first} but {filler} {last}", "+" if good else "-", NOWHERE))
    return examples
