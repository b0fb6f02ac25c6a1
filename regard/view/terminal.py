"""The brief for the terminal: what every head does in a few words, and the text shaded by the attention it received.
 Small models get a cell a head; models of many heads one line a layer, with a sign for every head and the most telling
ones in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from regard.view.brief import HABITS, Brief, briefs
from regard.view.record import Record, check, label, rows
from regard.view.token import Reading, read

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

_MANY = 96  # more heads than this, and a layer becomes one line
_CELL = 26  # a cell of this many columns holds most briefs: three in 80 columns, four in 120
_LINES = 2  # a text that fills more lines than this is shaded once, not in every layer
_COLOURS = {  # a colour a habit, from Okabe and Ito's set: told apart without red against green
    "previous": "#56b4e9",
    "next": "#4fd1c5",
    "itself": "#f0e442",
    "first": "#8a8f99",
    "separator": "#8a8f99",
    "punctuation": "#8a8f99",
    "same": "#009e73",
    "induction": "#009e73",
    "wide": "#cc79a7",
    "pair": "#e69f00",
    "none": "#8a8f99",
}
# Shades from nothing to all: lightness rises evenly, so the order survives any kind of colour sight.
_SHADES = ("", "#1d2a4d", "#234077", "#2a5a9e", "#3a7cb8", "#5fa3c7", "#97c9d0", "#d9ecd4")
_BARS = " ▁▂▃▄▅▆▇"
_ASCII = str.maketrans(
    dict(zip("←→↺⇤▪¶⤳≈∙∅·×“”─…", '<>o|#.^~*0-x""-~', strict=True))
    | {"≥": ">="}
    | {bar: str(n) for n, bar in enumerate(_BARS) if n}
)


@dataclass(frozen=True)
class _Layer:
    label: str
    kind: str
    briefs: list[Brief]
    text: int  # which text its keys are
    received: Tensor  # (S,) attention received, the mean of the heads; 1 is an even share where L = S
    exact: bool


def terminal(
    records: Sequence[Record], tokens: Sequence[str], *, batch: int = 0, key_tokens: Sequence[str] | None = None
) -> RenderableType:
    """A rich renderable that tells what every head attends to.
     `records` are calls of attention (see `regard.view.record.Record`), with top weights and keys `(B,H,L,k)`, received
    `(B,H,S)` and entropy `(B,H,L)` in nats; entry `batch` of B is shown. `tokens` are the L tokens of the queries,
    `key_tokens` the S tokens of the keys of cross attention
    (`tokens` by default). It fits itself to the width of the console, and to one without colours or without Unicode.

        Raises ValueError where `records` is empty or the tokens do not fit them, ImportError where rich is missing.
    """
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError("the terminal view needs rich: pip install 'regard[look]'") from error
    layers, sides = [], check(records, tokens, key_tokens, batch)
    for record, side in zip(records, sides, strict=True):
        seen = rows(record, batch)
        received = seen.received.mean(0)
        told = briefs(record, seen, side)
        layers.append(_Layer(label(record, side), record.kind, told, side.key_text, received, seen.received_exact))
    texts = [read(tokens)] + ([] if key_tokens is None else [read(key_tokens)])
    return _Glance(layers, texts)


class _Glance:
    """Lays itself out when it is printed, for only then the width and the colours are known."""

    def __init__(self, layers: list[_Layer], texts: list[list[Reading]]) -> None:
        self.layers, self.texts = layers, texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        page = _Sheet(options.max_width, console.color_system is not None and not console.no_color, options.ascii_only)
        heads = sum(len(layer.briefs) for layer in self.layers)
        yield page.plain(self._intro(heads))
        yield page.plain("")
        if heads > _MANY:
            yield from page.strips(self.layers)
            yield page.plain("")
            yield from self._ends(page)
        else:
            short = all(page.lines(text) <= _LINES for text in self.texts)
            for layer in self.layers:
                yield page.rule(layer.label)
                if short:
                    yield page.shaded(self.texts[layer.text], layer.received)
                yield from page.cells(layer.briefs)
                yield page.most(self.texts[layer.text], layer)
                yield Text()
            if not short:
                yield from self._ends(page)
        yield from page.legend({brief.pattern for layer in self.layers for brief in layer.briefs})

    def _intro(self, heads: int) -> str:
        counts = {len(layer.briefs) for layer in self.layers}
        many = len(self.layers)
        shape = f"{many} layer{'s' * (many > 1)}" + (
            f" × {counts.pop()} heads" if len(counts) == 1 else f", {heads} heads"
        )
        length = " and ".join(str(len(text)) for text in self.texts)
        return f"{shape} over {length} tokens: what each head looks at, and how much attention each token received."

    def _ends(self, page: _Sheet) -> Iterator[Text]:
        """The text as the first, the middle and the last layer attend to it; all layers together where it is long."""
        for index, text in enumerate(self.texts):
            layers = [layer for layer in self.layers if layer.text == index]
            if not layers:
                continue
            if page.lines(text) > 2 * _LINES or len(layers) < 4:
                total = sum((layer.received for layer in layers[1:]), start=layers[0].received)
                yield page.rule(f"attention received, {len(layers)} layers together")
                yield page.shaded(text, total)
                yield page.plain("")
                continue
            for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
                yield page.rule(f"attention received in {layer.label}")
                yield page.shaded(text, layer.received)
                yield page.plain("")


@dataclass(frozen=True)
class _Sheet:
    """What the console can show. Text goes in as rich Text, never as markup, so a token in brackets stays one."""

    width: int
    colour: bool
    ascii: bool

    @property
    def cut(self) -> Literal["crop", "ellipsis"]:
        return "crop" if self.ascii else "ellipsis"

    def plain(self, text: str, style: str = "") -> Text:
        from rich.text import Text

        return Text(self.said(text), style=style)

    def said(self, text: str) -> str:
        if not self.ascii:
            return text
        plain = text.replace(" → ", " -> ").translate(_ASCII)
        return plain.encode("ascii", "backslashreplace").decode("ascii")

    def rule(self, name: str) -> Text:
        line = self.plain(name, "bold")
        line.append(self.said(" " + "─" * max(0, self.width - line.cell_len - 1)), style="not bold dim default")
        return line

    def lines(self, text: list[Reading]) -> int:
        from rich.cells import cell_len

        extra = 1 if self.colour else 2
        return math.ceil(sum(cell_len(r.text) + extra * (not r.continues) for r in text) / max(1, self.width - 2))

    def shaded(self, text: list[Reading], amount: Tensor) -> Text:
        """The text, each token on a background by its amount; without colours, with a bar behind it."""
        from rich.text import Text

        line = Text(overflow="fold")
        # Special tokens often take ten times what any word does: the scale ends at the greatest word.
        words_only = [max(0.0, a) for a, r in zip(amount.tolist(), text, strict=True) if not r.marker]
        most = max(words_only, default=0.0) or max(float(amount.max()), 1e-9)
        for n, reading in enumerate(text):
            share = min(1.0, max(0.0, float(amount[n])) / most)
            level = round(share * (len(_SHADES) - 1))
            if n and not reading.continues:
                line.append(" ")
            word = self.said(reading.text)
            if self.colour:
                line.append(word, style=_shade(level) if level else "")
            else:
                line.append(word + self.said(_BARS[level]).strip())
        return line

    def cells(self, told: list[Brief]) -> Iterator[Text]:
        """A cell a head, in the same columns for every layer, read line by line."""
        from rich.text import Text

        columns = max(1, min(self.width // _CELL, len(told), 6))
        columns = math.ceil(len(told) / math.ceil(len(told) / columns))  # as few, as long as it costs no line
        room = self.width // columns
        for start in range(0, len(told), columns):
            line = Text(no_wrap=True, overflow=self.cut)
            for head in range(start, min(start + columns, len(told))):
                cell = self.cell(head, told[head], room - 1)
                cell.pad_right(room - cell.cell_len)
                line.append_text(cell)
            line.rstrip()
            yield line

    def cell(self, head: int, brief: Brief, room: int) -> Text:
        words = brief.words
        if brief.pattern == "wide" and brief.entropy is not None and len(words) + 5 > room:
            words = f"spread wide {brief.entropy:.1f}/{brief.room:.1f}"
        cell = self.plain(f"{head:>2} ")
        cell.stylize("dim")
        cell.append(self.said(brief.sign), style=f"bold {_COLOURS[brief.pattern]}")
        quiet = brief.pattern in ("separator", "first", "punctuation", "wide", "none")
        what = self.plain(f" {words}")
        if cell.cell_len + what.cell_len > room:  # a long token loses its end, the number stays
            name, number = what.plain.rsplit(" ", 1)
            what = self.plain(name)
            what.truncate(max(1, room - cell.cell_len - len(number) - 1), overflow=self.cut)
            what.append(f" {number}")
        what.stylize("dim" if quiet else "not dim")
        return cell.append_text(what)

    def most(self, text: list[Reading], layer: _Layer) -> Text:
        count = min(4 if self.width < 100 else 6, len(text))
        amounts, places = layer.received.topk(count)
        sign = "" if layer.exact else "≥"
        told = [f"{text[p].text} {sign}{a:.1f}" for a, p in zip(amounts.tolist(), places.tolist(), strict=True)]
        line = self.plain("   received most: " + " · ".join(told), "dim")
        line.no_wrap, line.overflow = True, self.cut
        return line

    def strips(self, layers: list[_Layer]) -> Iterator[Text]:
        """A line a layer: its name, a sign for every head, then the most telling heads in words, as many as fit."""
        from rich.text import Text

        names = [layer.label.replace("layer ", "") if layer.kind != "cross" else layer.label for layer in layers]
        wide = max(len(name) for name in names)
        strip = min(max(len(layer.briefs) for layer in layers), self.width // 3)
        for name, layer in zip(names, layers, strict=True):
            line = Text(no_wrap=True, overflow=self.cut)
            line.append(self.said(name).rjust(wide) + " ", style="dim")
            for brief in layer.briefs[:strip]:
                line.append(self.said(brief.sign), style=_COLOURS[brief.pattern])
            line.pad_right(wide + 1 + strip - line.cell_len)
            for head, brief in _telling(layer.briefs):
                words = self.plain("  ")
                words.append(f"{head} ", style="dim")
                words.append(self.said(brief.words))
                if line.cell_len + words.cell_len > self.width:
                    continue
                line.append_text(words)
            yield line

    def legend(self, patterns: set[str]) -> Iterator[Text]:
        """What the signs and the shades mean, broken between entries and never inside one."""
        from rich.text import Text

        line = Text()
        for pattern, (sign, name) in HABITS.items():
            if pattern not in patterns:
                continue
            name = {"pair": "strongest link", "wide": "spread wide, entropy in nats"}.get(pattern, name)
            entry = self.plain(sign, f"bold {_COLOURS[pattern]}")
            entry.append(self.said(f" {name}   "), style="not bold dim default")
            if line.cell_len + entry.cell_len - 3 > self.width:
                yield line
                line = Text()
            line.append_text(entry)
        yield line
        scale = self.plain("attention received: less ", "dim")
        for level in range(1, len(_SHADES)):
            block = "  " if self.colour else self.said(_BARS[level])
            scale.append(block, style=f"not dim {_shade(level)}" if self.colour else "")
        scale.append(" more")
        yield scale


def shade(share: float) -> str:
    """The style of a ground that shows a share from 0 to 1."""
    level = round(min(max(share, 0.0), 1.0) * (len(_SHADES) - 1))
    return _shade(level) if level else ""


def _shade(level: int) -> str:
    return f"{'#10141f' if level >= 5 else '#ffffff'} on {_SHADES[level]}"


def _telling(told: list[Brief]) -> list[tuple[int, Brief]]:
    """Heads with their briefs, the most telling first; a habit that heads share is told once, by the strongest."""
    ranked = sorted(enumerate(told), key=lambda pair: -pair[1].telling)
    seen: set[str] = set()
    chosen = []
    for head, brief in ranked:
        habit = brief.words.rsplit(" ", 1)[0] if brief.pattern != "wide" else "wide"
        if habit not in seen:
            seen.add(habit)
            chosen.append((head, brief))
    return chosen
