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

from regard.view.data import Data, PageInput
from regard.view.picture import Picture
from regard.view.record import Record

BUDGET = 20_000_000  # bytes of data: a browser takes that in a second


def page(
    records: Sequence[Record],
    tokens: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
    budget: int = BUDGET,
    picture: Picture | None = None,
    other: PageInput | None = None,
) -> str:
    """A whole HTML document, as text, that shows what every head of `records` attends to.

    `records` are calls of attention (see `regard.view.record.Record`), with top weights and keys `(B,H,L,k)`, received
    `(B,H,S)` and entropy `(B,H,L)` in nats; entry `batch` of B is shown. `tokens` are the L tokens of the queries,
    `key_tokens` the S tokens of the keys of cross attention (`tokens` by default). The page is self-contained and makes
    no request.

    Weights are kept to 0.00003. Where the records hold fewer than all keys of a row, or more than a page can, the page
    states the weight it does not show. Every head is in the overview; in detail, as many as fit in `budget` bytes, the
    most telling first (`regard serve` shows them all).

    `picture` is what the text that is looked at was cut from, for vision models: its patches are shaded as words are.

    `other` is what another model attended to, or the same one in another text: its heads stand below, under its name.

    Raises ValueError where `records` is empty, the tokens do not fit them, or the picture does not fit the tokens.
    """
    patches = None if picture is None else picture.describe(len(tokens if key_tokens is None else key_tokens))
    seen = [PageInput(title or "first", records, tokens, key_tokens), *([] if other is None else [other])]
    return document(Data(seen, batch), title, subtitle, budget, picture=patches)


def document(
    data: Data,
    title: str = "",
    subtitle: str = "",
    budget: int = BUDGET,
    served: bool = False,
    picture: dict[str, Any] | None = None,
) -> str:
    """The same of data, and of a picture as `Picture.describe` gives it; one that is `served` asks for the heads that it
    does not hold.
    """
    whole = {"title": title, "subtitle": subtitle, "served": served, "picture": picture, **data.whole(budget)}
    return _document(title or "What the heads look at", whole, served)


def _document(title: str, data: dict[str, Any], served: bool) -> str:
    assets = resources.files("regard.view")
    style = assets.joinpath("page.css").read_text("utf-8")
    script = assets.joinpath("page.js").read_text("utf-8")  # built from frontend/ by `make page`
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    if served:
        policy += "; connect-src 'self'"
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
