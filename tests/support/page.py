"""What a page holds and shows, read back; and tokens that no page may take for markup."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>"
TOKENS = ["[CLS]", "the", "cat", HOSTILE, "un", "##like", "'", '"', "&amp;", "{{data}}", "\u2028", "[SEP]"]


def block(document: str) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', document, re.S)
    assert found
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def unpacked(text: str) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in base64.b64decode(text):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number, shift = 0, 0
    return numbers


def read_back(text: str, queries: int) -> list[tuple[bool, dict[int, float]]]:
    """The rows of a packed head: (complete, {key: weight}), after the description in pack.py and not its code."""
    stream = iter(unpacked(text))
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
    found: list[str] = tab.locator(f".column.{kind} .figure").all_text_contents()
    return found
