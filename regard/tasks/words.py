"""Tokenization of sentences into words and letters, the inputs of `models.sentence_encoder.SentenceEncoder`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

import torch

from regard.models.sentence_encoder import SentenceBatch
from regard.tasks.batch import pad
from regard.tasks.labels import name_some
from regard.tasks.scripts import UNSPACED
from regard.tasks.tokens import UNKNOWN, Tokens, remark_on_characters

# Longer words are truncated.
_MAX_LETTERS = 40


@cache
def _pattern() -> re.Pattern[str]:
    """Return the pattern of a character of a script without spaces; of a word ("well-known", "O'Neill"); of an English
    clitic, which corpora treat as a word ("do|n't", "it|'s"); or of another symbol. Combining marks belong to their letters.
    """
    marks = "".join(chr(n) for n in range(0x10000) if unicodedata.category(chr(n)) in ("Mn", "Mc"))
    letter = rf"(?:(?![{UNSPACED}])[\w{marks}])"
    emoji = r"[^\w\s][\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]*"  # with its form and skin tone; U+200D joins several
    clitic = rf"['’](?:s|re|ve|ll|d|m)(?!{letter})"
    end = rf"n['’]t(?!{letter})"
    return re.compile(
        rf"[{UNSPACED}][{marks}]*|{letter}+?(?={end})|{end}|{clitic}|{letter}+(?:(?!{clitic})['’-]{letter}+)*|{emoji}(?:\u200d{emoji})*",
        re.IGNORECASE,
    )


def words_of(text: str) -> list[str]:
    """Split a text into words and symbols. Where a script has no spaces, each character is a word.

    >>> from regard.tasks.words import words_of
    >>> words_of("It's well-known, isn't it?")
    ['It', "'s", 'well-known', ',', 'is', "n't", 'it', '?']
    >>> words_of("我爱PyTorch。")
    ['我', '爱', 'PyTorch', '。']
    >>> words_of("good 👍🏽❤️!")
    ['good', '👍🏽', '❤️', '!']
    """
    return _pattern().findall(text)


def learn_tokens(sentences: Iterable[Sequence[str]], most: int, lowercase: bool) -> dict[str, Tokens]:
    """Build the vocabularies of words (at most `most`, which occur at least twice) and of letters."""
    rows = [[_join(word) for word in words] for words in sentences]
    words = Tokens.words((" ".join(row) for row in rows), most, least=2, lowercase=lowercase)
    return {"words": words, "letters": Tokens.letters(word for row in rows for word in row)}


def spell(sentences: Sequence[Sequence[str]], tokens: dict[str, Tokens]) -> SentenceBatch:
    """Convert sentences to a batch of word and letter IDs. The letters of each distinct word are stored once."""
    index = {word: i for i, word in enumerate(dict.fromkeys(word for words in sentences for word in words))}
    distinct = [_join(word) for word in index]
    word_ids = [(row or [UNKNOWN])[0] for row in tokens["words"].encode_all(distinct)]
    letter_ids = [(row or [UNKNOWN])[:_MAX_LETTERS] for row in tokens["letters"].encode_all(distinct)]
    spelled, lengths = pad([[index[word] for word in words] for words in sentences])
    spelled = spelled * (torch.arange(spelled.shape[1]) < lengths[:, None])
    letters, letter_lengths = pad(letter_ids)
    return SentenceBatch(torch.tensor(word_ids)[spelled], lengths, letters, letter_lengths, spelled)


def remark_on_words(texts: Sequence[str], tokens: dict[str, Tokens]) -> list[str]:
    """Return remarks, one line each, on unknown letters, and on texts most of whose words are unknown.

    >>> tokens = learn_tokens([["a", "good", "film"]] * 2, most=100, lowercase=True)
    >>> remark_on_words(["a mild fog"], tokens)
    ["2 of 3 words are not in the vocabulary of the model, which reads only their letters: 'mild', 'fog'"]
    """
    words = [word for text in texts for word in words_of(text)]
    rows = tokens["words"].encode_all([_join(word) for word in words])
    unknown = [word for word, row in zip(words, rows, strict=True) if UNKNOWN in row]
    remarks = remark_on_characters(words, tokens["letters"])
    if 2 * len(unknown) > len(words) and words:
        are, their = ("is", "its") if len(unknown) == 1 else ("are", "their")
        remarks.append(
            f"{len(unknown):,} of {len(words):,} words {are} not in the vocabulary of the model, which reads only {their} "
            f"letters: {name_some([*dict.fromkeys(unknown)])}"
        )
    return remarks


def _join(word: str) -> str:
    """Replace white space within a word, such as "10 000"."""
    return "_".join(word.split()) or "_"
