"""Readable tokens: marks of the tokenizer removed, invisible characters made visible, special tokens recognized.

Vocabularies mark word boundaries in one of several ways: `##ing` (WordPiece), `Ġthe` (byte-level BPE), `▁the`
(SentencePiece), `walk@@` (subword-nmt), `the</w>` (CLIP). All are reduced to the text of the piece, and whether it
continues a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

# Markers of a position in the text (start, end, separator, padding). `[UNK]` and `[MASK]` stand for words, and `<0x0A>`
# is a byte, so they are not markers.
_MARKER = re.compile(
    r"\[(?:CLS|SEP|PAD|BOS|EOS|START|END)\]|</?[sS]>|<\|[^<>|]+\|>"
    r"|<(?:pad|bos|eos|cls|sep|sos|go|start|end|start_of_\w+|end_of_\w+)>"
)
_UNKNOWN = re.compile(r"\[UNK\]|<\|?unk(?:nown)?\|?>", re.IGNORECASE)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WHITE = {" ": "␣", "\n": "↵", "\r": "↵", "\t": "⇥", "\u00a0": "␣", "\u3000": "␣"}


@dataclass(frozen=True)
class Reading:
    """A readable token: its text, the raw token, whether it continues a word, whether it is a marker such as [SEP]."""

    text: str
    raw: str
    continues: bool
    marker: bool


def read(tokens: Sequence[str]) -> list[Reading]:
    """Return the readable tokens, in order. The marks of word boundaries are inferred from the tokens.

    >>> [(reading.text, reading.continues) for reading in read(["[CLS]", "un", "##like", "[SEP]"])]
    [('[CLS]', False), ('un', False), ('like', True), ('[SEP]', False)]
    """
    style = _style(tokens)
    readings: list[Reading] = []
    open_word = False  # for styles that mark the end of a piece: the previous piece left its word open
    started = False  # right after a marker, an unmarked byte-level or SentencePiece piece starts a word too
    for raw in tokens:
        if is_marker(raw):
            readings.append(Reading(_visible(raw), raw, False, True))
            open_word = started = False
            continue
        text, continues = raw, False
        if style == "##":
            continues = raw.startswith("##") and len(raw) > 2
            text = raw[2:] if continues else raw
        elif style == "Ġ":
            plain = _bytes_to_text(raw)
            continues = started and plain[:1].isalnum() and readings[-1].text[-1:].isalnum()
            text = plain[1:] if plain.startswith(" ") and len(plain) > 1 else plain
        elif style == "▁":
            byte = _BYTE.fullmatch(raw)
            text = chr(int(byte[1], 16)) if byte and int(byte[1], 16) < 128 else raw.replace("▁", " ")
            continues = started and text[:1].isalnum() and readings[-1].text[-1:].isalnum()
            text = text[1:] if text.startswith(" ") and len(text) > 1 else text
        elif style == "@@":
            continues, open_word = open_word, raw.endswith("@@") and len(raw) > 2
            text = raw[:-2] if open_word else raw
        elif style == "</w>":
            continues, open_word = open_word, not raw.endswith("</w>")
            text = raw.removesuffix("</w>")
        started = True
        readings.append(Reading(_visible(text), raw, continues, False))
    return readings


def is_marker(token: str) -> bool:
    """Return whether a token is a marker ([CLS], [SEP], <s>, </s>, <|endoftext|>, ...) instead of text.

    >>> is_marker("[SEP]"), is_marker("[MASK]")
    (True, False)
    """
    return _MARKER.fullmatch(token) is not None


@lru_cache(1 << 16)
def isolate(text: str) -> str:
    """Return a text for use within a sentence: one that is written from right to left is enclosed in the characters FSI
    and PDI, so that it does not reorder the words around it.

    Source: Unicode Standard Annex 9, section 2.4.2.

    >>> isolate("cat"), isolate("قط") == "\u2068قط\u2069"
    ('cat', True)
    """
    is_from_right = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    return f"\u2068{text}\u2069" if is_from_right else text


def is_unknown(token: str) -> bool:
    """Return whether a token stands for text that is not in the vocabulary.

    >>> is_unknown("[UNK]"), is_unknown("▁<unk>"), is_unknown("unknown")
    (True, True, False)
    """
    return _UNKNOWN.fullmatch(token.removeprefix("▁")) is not None


@lru_cache(1 << 16)
def is_punctuation(text: str) -> bool:
    """Return whether a text consists of punctuation only.

    >>> is_punctuation("..."), is_punctuation("U.S.")
    (True, False)
    """
    return bool(text) and all(unicodedata.category(c).startswith("P") for c in text)


def _style(tokens: Sequence[str]) -> str:
    if any(t.startswith("##") and len(t) > 2 for t in tokens):
        return "##"
    if any(t.startswith(("Ġ", "Ċ")) for t in tokens):
        return "Ġ"
    if any(t.startswith("▁") for t in tokens):
        return "▁"
    if any(t.endswith("@@") and len(t) > 2 for t in tokens):
        return "@@"
    if any(t.endswith("</w>") for t in tokens):
        return "</w>"
    return ""


@cache
def _byte_of() -> dict[str, int]:
    """The characters of bytes in byte-level BPE (GPT-2): printable ones stand for themselves, others start at U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(rest)}


@lru_cache(1 << 16)
def _bytes_to_text(raw: str) -> str:
    table = _byte_of()
    if not all(c in table for c in raw):
        return raw  # an added token, written in plain text
    return bytes(table[c] for c in raw).decode("utf-8", "replace")


@lru_cache(1 << 16)
def _visible(text: str) -> str:
    """Replace white space and control characters by symbols: they would be invisible, or control the terminal or layout."""
    if not text:
        return "∅"
    if text.isspace():
        return "".join(_WHITE.get(c, "␣") for c in text)
    symbols = []
    for c in text:
        if c in "\n\r\t":
            symbols.append(_WHITE[c])
        elif unicodedata.category(c) == "Cc":
            symbols.append(chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd")
        elif c in "\u2028\u2029" or (unicodedata.category(c) == "Cf" and c not in "\u200c\u200d"):
            symbols.append("\ufffd")
        else:
            symbols.append(c)
    return "".join(symbols)
