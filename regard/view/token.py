"""How a token reads: the tokenizer's marks taken off, what cannot be seen made visible, special tokens recognised.
 A vocabulary writes word borders in one of several ways: `##ing` (WordPiece), `Ġthe` (byte-level BPE), `▁the`
(SentencePiece), `walk@@` (subword-nmt), `the</w>` (CLIP). All become the same two facts: the text of the piece, and
whether it continues a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

# Markers that stand for a place in the text (start, end, separator, padding), not for a word. `[UNK]` and `[MASK]`
# stand for words and `<0x0A>` is a byte, so they are left out.
_MARKER = re.compile(
    r"\[(?:CLS|SEP|PAD|BOS|EOS|START|END)\]|</?[sS]>|<\|[^<>|]+\|>"
    r"|<(?:pad|bos|eos|cls|sep|sos|go|start|end|start_of_\w+|end_of_\w+)>"
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WHITE = {" ": "␣", "\n": "↵", "\r": "↵", "\t": "⇥", "\u00a0": "␣", "\u3000": "␣"}


@dataclass(frozen=True)
class Reading:
    """A token as a person reads it: its text, whether it continues a word, whether it is a marker such as [SEP]."""

    text: str
    raw: str
    continues: bool
    marker: bool


def read(tokens: Sequence[str]) -> list[Reading]:
    """Readings of `tokens`, in order. The way of marking word borders is told from the tokens themselves."""
    style = _style(tokens)
    readings: list[Reading] = []
    open_word = False  # only for the styles that mark the end of a piece: did the piece before leave its word open?
    started = False  # a byte or SentencePiece piece without a mark right after a marker starts a word all the same
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
    """Whether a token marks a place ([CLS], [SEP], <s>, </s>, <|endoftext|>, ...) instead of standing for text."""
    return _MARKER.fullmatch(token) is not None


@lru_cache(1 << 16)
def is_punctuation(text: str) -> bool:
    """Whether a token's text is punctuation alone."""
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
    """The letters byte-level BPE writes for bytes (GPT-2's): printable ones for themselves, the rest from U+0100."""
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
    """White space and control characters as signs: as they are they would vanish, or steer a terminal or the layout."""
    if not text:
        return "∅"
    if text.isspace():
        return "".join(_WHITE.get(c, "␣") for c in text)
    signs = []
    for c in text:
        if c in "\n\r\t":
            signs.append(_WHITE[c])
        elif unicodedata.category(c) == "Cc":
            signs.append(chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd")
        elif c in "\u2028\u2029" or (unicodedata.category(c) == "Cf" and c not in "\u200c\u200d"):
            signs.append("\ufffd")
        else:
            signs.append(c)
    return "".join(signs)
