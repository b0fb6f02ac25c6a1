"""Readers for the data and the content of pages, and tokens that must not become markup."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>"
TOKENS = ["[CLS]", "the", "cat", HOSTILE, "un", "##like", "'", '"', "&amp;", "{{data}}", "\u2028", "[SEP]"]


def block(document: str) -> dict[str, Any]:
    """Return the data of a page."""
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', document, re.S)
    assert match
    loaded: dict[str, Any] = json.loads(match[1])
    return loaded


def decode_varints(text: str) -> list[int]:
    """Decode base64 varints."""
    numbers, number, shift = [], 0, 0
    for byte in base64.b64decode(text):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number, shift = 0, 0
    return numbers


def read_back(text: str, queries: int) -> list[tuple[bool, dict[int, float]]]:
    """Decode the rows of a head as (complete, {key: weight}), as specified in pack.py but without its code."""
    stream = iter(decode_varints(text))
    out = []
    for _ in range(queries):
        head, key, row = next(stream), -1, {}
        for _ in range(head >> 2):
            key += 1 if head & 2 else next(stream) + 1
            row[key] = next(stream) / 16383
        out.append((bool(head & 1), row))
    assert next(stream, None) is None
    return out


def figures(tab: Any, kind: str) -> list[str]:
    """Return the numbers beside the tokens of a column, "query" or "key"."""
    texts: list[str] = tab.locator(f".column.{kind} .figure").all_text_contents()
    return texts
