"""The page: one self-contained HTML document that shows what every head attends to.

The assets beside this file (page.html, page.css and page.js) are inlined, and the data is one JSON block. A token cannot
end that block, and the content security policy of the page forbids all other scripts and all requests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from regard.version import __version__
from regard.view.data import Data, PageInput
from regard.view.picture import Picture
from regard.view.record import RecordLike

BUDGET = 20_000_000  # bytes of data, which a browser parses in about a second


def page(
    records: Sequence[RecordLike],
    tokens: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
    produced: Sequence[str] | None = None,
    budget: int = BUDGET,
    picture: Picture | None = None,
    other: PageInput | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return a self-contained HTML document that shows what every head of `records` attends to.

    Weights are exact to 0.00003. Where the records list fewer than all keys of a row, or more than a page can hold, the
    page states the total weight that it does not show. The overview shows every head; details are included for as many
    heads as fit in `budget` bytes, the most informative ones first (`regard serve` shows all of them).

    Args:
        records: attention calls (see `regard.view.record.RecordLike`), with top weights and keys (B, H, L, k), received
            (B, H, S) and entropy (B, H, L) in nats.
        tokens: the L tokens of the queries.
        title, subtitle: the headings of the page.
        batch: the index in B that is shown.
        key_tokens: the S tokens of the keys of cross attention; `tokens` by default.
        produced: the L tokens that a decoder produces at the positions of `tokens`, which name its queries in cross
            attention; see `Recording.produced`.
        budget: the size of the data in bytes.
        picture: for vision models, the picture whose patches are the last tokens of the keys.
        other: the attention of another model, or of the same model on another text; its heads follow under its name.
        notes: sentences that a reader must know, for example that the end of the text was cut off. How many tokens are
            unknown to the model, and whether the text is too short for patterns, is stated without them.

    Raises:
        ValueError: `records` is empty, or the tokens or the picture do not match them.

    >>> import re
    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> document = page(records, ["the", "cat", "sat"], title="A layer")
    >>> re.findall("<title>(.*)</title>", document), '["cat",0,0]' in document
    (['A layer · regard'], True)
    """
    patches = None if picture is None else picture.describe(len(tokens if key_tokens is None else key_tokens))
    inputs = [PageInput(title or "first", records, tokens, key_tokens, produced), *([] if other is None else [other])]
    return document(Data(inputs, batch), title, subtitle, budget, picture=patches, notes=notes)


def document(
    data: Data,
    title: str = "",
    subtitle: str = "",
    budget: int = BUDGET,
    served: bool = False,
    picture: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the HTML document of `data`, with a picture as returned by `Picture.describe`. A `served` page fetches the
    details that it does not hold.

    >>> from regard.view.data import Data
    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> data = Data([PageInput("a layer", records, ["the", "cat", "sat"])])
    >>> ["connect-src" in document(data, served=served) for served in (False, True)]
    [False, True]
    """
    payload = {
        "title": title,
        "subtitle": subtitle,
        "notes": [*notes, *data.remarks],
        "version": __version__,
        "served": served,
        "picture": picture,
        **data.to_json(budget),
    }
    return _document(title or "Attention heads", payload, served)


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
    while document:  # a single pass, so that a placeholder in a title is not replaced
        start = document.find("{{")
        if start < 0:
            break
        end = document.index("}}", start) + 2
        out += [document[:start], fields[document[start:end]]]
        document = document[end:]
    out.append(document)
    # a lone surrogate could not be written to a file
    return "".join(out).encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: dict[str, Any]) -> str:
    """Return JSON that cannot be parsed as markup: <, >, & and line separators are escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text
