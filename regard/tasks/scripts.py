"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese kana and Chinese characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

# Ranges of characters, for a character class of a regular expression.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff"


def bleu_tokenizer(texts: Iterable[str]) -> str:
    """Return the name of the tokenizer with which sacreBLEU splits texts: "13a", its default, would take a sentence without
    spaces for a single word. Chinese has a tokenizer of its own; other scripts without spaces are split into characters.

    >>> bleu_tokenizer(["a dog"]), bleu_tokenizer(["我爱你。"]), bleu_tokenizer(["犬が走る。"])
    ('13a', 'zh', 'char')
    """
    counts = [0, 0, 0, 0]
    for text in texts:
        for i, pattern in enumerate(_patterns()):
            counts[i] += len(pattern.findall(text))
    letters, unspaced, han, kana = counts
    if 3 * unspaced < letters - unspaced:  # a Latin word has several letters
        return "13a"
    return "zh" if 2 * han > unspaced and 10 * kana < han else "char"


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in (r"\w", f"[{UNSPACED}]", f"[{_HAN}]", f"[{_KANA}]"))
