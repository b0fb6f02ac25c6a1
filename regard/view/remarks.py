"""Remarks on texts that a reader must know to judge what the views show."""

from __future__ import annotations

from collections.abc import Sequence

from regard.view.token import is_unknown

_SHORT = 8  # in fewer tokens, uniform attention would reach the shares by which patterns are recognized


def remarks(*texts: Sequence[str] | None) -> list[str]:
    """Return the remarks on texts, as sentences: how many of their tokens are unknown to the model, and whether they are
    too short for the patterns of heads.

    >>> remarks(["[CLS]", "the", "[UNK]", "sat", "on", "the", "mat", ".", "[SEP]"])
    ['1 of 9 tokens is unknown to the model ([UNK]): it cannot tell it from other words.']
    >>> remarks(["the", "cat", "sat"])
    ['The text has fewer than 8 tokens: most patterns of heads cannot be recognized in it.']
    """
    given = [text for text in texts if text is not None]
    sentences = []
    names = [token for text in given for token in text if is_unknown(token)]
    if names:
        count, total = len(names), sum(len(text) for text in given)
        verb, them = ("is", "it") if count == 1 else ("are", "them")
        sentences.append(
            f"{count} of {total} tokens {verb} unknown to the model ({names[0]}): it cannot tell {them} from other words."
        )
    if given and all(len(text) < _SHORT for text in given):
        subject = "The text has" if len(given) == 1 else "The texts have"
        sentences.append(
            f"{subject} fewer than {_SHORT} tokens: most patterns of heads cannot be recognized in "
            f"{'it' if len(given) == 1 else 'them'}."
        )
    return sentences
