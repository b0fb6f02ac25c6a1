"""Sentences as the words that `models.Reader` takes, and their letters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from regard.models.reader import Words
from regard.tasks.batch import pad
from regard.tasks.tokens import UNKNOWN, Tokens

# A word ("well-known", "O'Neill"), what hangs on one in English, which corpora take for a word ("do|n't", "it|'s"), or one
# other sign.
_CLITIC = r"['’](?:s|re|ve|ll|d|m)\b"
_WORD = re.compile(rf"\w+?(?=n['’]t\b)|n['’]t\b|{_CLITIC}|\w+(?:(?!{_CLITIC})['’-]\w+)*|[^\w\s]", re.IGNORECASE)
# Letters beyond these tell a word from no other that matters.
_MOST_LETTERS = 40


def words_of(text: str) -> list[str]:
    """The words and signs of a text, in order."""
    return _WORD.findall(text)


def learn_tokens(sentences: Iterable[Sequence[str]], most: int, lowercase: bool) -> dict[str, Tokens]:
    """The vocabularies of words and of letters. A word that occurs once is known by its letters alone."""
    rows = [[_whole(word) for word in words] for words in sentences]
    words = Tokens.words((" ".join(row) for row in rows), most, least=2, lowercase=lowercase)
    return {"words": words, "letters": Tokens.letters(word for row in rows for word in row)}


def spell(sentences: Sequence[Sequence[str]], tokens: dict[str, Tokens]) -> Words:
    """Sentences side by side, as numbers."""
    different = {word: i for i, word in enumerate(dict.fromkeys(word for words in sentences for word in words))}
    whole = [_whole(word) for word in different]
    numbers = [(row or [UNKNOWN])[0] for row in tokens["words"].encode_all(whole)]
    letters = [(row or [UNKNOWN])[:_MOST_LETTERS] for row in tokens["letters"].encode_all(whole)]
    spelled, lengths = pad([[different[word] for word in words] for words in sentences])
    spelled = spelled * (torch.arange(spelled.shape[1]) < lengths[:, None])
    table, letter_lengths = pad(letters)
    return Words(torch.tensor(numbers)[spelled], lengths, table, letter_lengths, spelled)


def _whole(word: str) -> str:
    """A word with white space inside, as one: "10 000"."""
    return "_".join(word.split()) or "_"
