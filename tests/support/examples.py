"""Examples of tasks, made up, that a small model learns in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from regard.tasks.data import Labelled, Pair, Place, Tagged

NOWHERE = Place(Path("made"), 1)


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Letters, and the same backwards, in capitals."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcd", k=chance.randint(2, 5))) for _ in range(count)]
    return [Pair(word, " ".join(word[::-1].upper()), NOWHERE) for word in words]


def sentences(count: int, seed: int = 0) -> list[Tagged]:
    """Words of made-up stems whose ending tells the tag, but that an "es" after "zu" is a verb."""
    chance, endings = random.Random(seed), {"ung": "NOUN", "en": "VERB", "ig": "ADJ", "es": "PRON"}
    found = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(chance.randint(2, 7)):
            ending = chance.choice(list(endings))
            after = chance.random() < 0.3
            words += [*(["zu"] if after else []), "".join(chance.choices("bdfgkl", k=3)) + ending]
            tags += [*(["PART"] if after else []), "VERB" if after and ending == "es" else endings[ending]]
        found.append(Tagged(words, tags, NOWHERE))
    return found


def reviews(count: int, seed: int = 0) -> list[Labelled]:
    """What is said before "but" does not count."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        good = chance.random() < 0.5
        filler = " ".join(chance.choices(["the", "film", "plot", "was", "a"], k=chance.randint(1, 5)))
        first, last = ("bad", "good") if good else ("good", "bad")
        found.append(Labelled(f"{first} but {filler} {last}", "+" if good else "-", NOWHERE))
    return found
