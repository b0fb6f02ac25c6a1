"""The page: one HTML document that shows what every head attends to, with all it needs inside it.
 The assets beside this file (page.html, page.css and the scripts) are inlined as they are; the data goes in as one JSON
block. A token cannot leave that block, and the policy in the page's head forbids every script but ours and every
request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from regard.view import pack
from regard.view.brief import HABITS, Brief, briefs
from regard.view.record import Record, Rows, Sides, check, label, rows
from regard.view.token import Reading, read

SCRIPTS = ("decode", "colour", "state", "reading", "overview", "lines", "matrix", "detail", "save", "page")
_ENTRIES = 4_000_000  # weights a page holds, about 6 MB; beyond, a row keeps its largest and the page states the rest


def page(
    records: Sequence[Record],
    tokens: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
) -> str:
    """A whole HTML document, as text, that shows what every head of `records` attends to.
     `records` are calls of attention (see `regard.view.record.Record`), with top weights and keys `(B,H,L,k)`, received
    `(B,H,S)` and entropy `(B,H,L)` in nats; entry `batch` of B is shown. `tokens` are the L tokens of the queries,
    `key_tokens` the S tokens
    of the keys of cross attention (`tokens` by default). The page is self-contained and makes no request.
     Weights are kept to 0.00003. Where the records hold fewer than all keys of a row, or more than a page can, the page
    states the weight it does not show. Raises ValueError where `records` is empty or the tokens do not fit them.
    """
    sides = check(records, tokens, key_tokens, batch)
    texts = [read(tokens)] + ([] if key_tokens is None else [read(key_tokens)])
    most = max(8, _ENTRIES // max(1, sum(record.heads * record.queries for record in records)))
    told: list[list[Brief]] = []
    layers: list[dict[str, Any]] = []
    for record, side in zip(records, sides, strict=True):
        seen = rows(record, batch)
        told.append(briefs(record, seen, side))
        layers.append(_layer(record, side, seen, told[-1], most))
    data = {
        "title": title,
        "subtitle": subtitle,
        "one": pack.ONE,
        "thousand": pack.THOUSAND,
        "habits": HABITS,
        "texts": [[_token(reading) for reading in text] for text in texts],
        "layers": layers,
        "start": _start(records, told),
    }
    return _document(title or "What the heads look at", data)


def _layer(record: Record, side: Sides, seen: Rows, told: list[Brief], most: int) -> dict[str, Any]:
    rest = (1 - seen.weights[..., :most].sum(-1)).clamp(0, 1)
    packed = pack.heads(seen, most)
    entropy = None if seen.entropy is None else pack.quantised(seen.entropy, pack.THOUSAND)
    return {
        "label": label(record, side),
        "name": record.name,
        "kind": record.kind,
        "queryText": side.query_text,
        "keyText": side.key_text,
        "queries": record.queries,
        "keys": record.keys,
        "offset": seen.offset,  # of the first query in its text
        "causal": record.causal,
        "top": min(int(seen.keys.shape[-1]), most),
        "receivedExact": seen.received_exact,
        "heads": [
            {
                "rows": packed[head],
                "rest": pack.varints(pack.quantised(rest[head], pack.ONE)),
                "entropy": None if entropy is None else pack.varints(entropy[head]),
                "received": pack.varints(pack.quantised(seen.received[head], pack.THOUSAND)),
                "pattern": brief.pattern,
                "words": brief.words,
                "sentence": brief.sentence,
                "meanEntropy": None if brief.entropy is None else round(brief.entropy, 3),
                "room": round(brief.room, 3),
                "pair": brief.pair and [brief.pair.query, brief.pair.key, round(brief.pair.weight, 3)],
            }
            for head, brief in enumerate(told)
        ],
    }


def _token(reading: Reading) -> list[str | int]:
    """[text, 1 if it continues a word, 1 if a marker, raw where that differs], cut short at the end where it can be."""
    token: list[str | int] = [reading.text, int(reading.continues), int(reading.marker)]
    return token if reading.raw == reading.text else [*token, reading.raw]


def _start(records: Sequence[Record], told: list[list[Brief]]) -> list[int]:
    """The head the page opens with: the sharpest link across the text, in cross attention if there is any."""

    def interest(place: tuple[int, int]) -> float:
        brief = told[place[0]][place[1]]
        cross = 1.0 if records[place[0]].kind == "cross" else 0.0
        if brief.pattern == "pair" and brief.pair is not None:
            near = not cross and abs(brief.pair.query - brief.pair.key) < 3  # a neighbour tells less of the text
            return (
                cross
                + 1
                + brief.pair.weight * (0.6 if near else 1.0)
                - 0.5 * (brief.entropy or 0.0) / max(brief.room, 1e-9)
            )
        return cross + brief.telling

    places = [(layer, head) for layer, heads in enumerate(told) for head in range(len(heads))]
    layer, head = max(places, key=interest, default=(0, 0))
    return [layer, head]


def _document(title: str, data: dict[str, Any]) -> str:
    assets = resources.files("regard.view")
    style = assets.joinpath("page.css").read_text("utf-8")
    parts = [assets.joinpath(f"{name}.js").read_text("utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    fields = {
        "{{policy}}": html.escape(policy, quote=True),
        "{{title}}": html.escape(title),
        "{{style}}": style,
        "{{script}}": script,
        "{{data}}": _json(data),
    }
    document = assets.joinpath("page.html").read_text("utf-8")
    out = []
    while document:  # one pass, so that a title that reads {{data}} stays a title
        start = document.find("{{")
        if start < 0:
            break
        end = document.index("}}", start) + 2
        out += [document[:start], fields[document[start:end]]]
        document = document[end:]
    out.append(document)
    # half a surrogate pair could not be written to a file
    return "".join(out).encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: dict[str, Any]) -> str:
    """JSON that no HTML parser can take for markup: every <, >, & and line separator is escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text
