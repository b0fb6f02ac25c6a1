"""The summary for the terminal: a short description of every head, and the text shaded by the attention it received.

Small models have one cell per head. Models with many heads have one line per layer, with a symbol for every head and
the most informative heads in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from regard.view.describe import HABITS, HeadDescription, describe_heads
from regard.view.record import RecordLike, check, label, rows
from regard.view.remarks import remarks
from regard.view.token import Reading, read

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

_MAX_CELLS = 96  # with more heads than this, a layer is one line
_CELL_WIDTH = 26  # columns per cell, which fit most descriptions: three in 80 columns, four in 120
_MAX_LINES = 2  # a text with more lines than this is shaded once, not in every layer
_COLORS = {  # one color per pattern, from the palette of Okabe and Ito, which is safe for color-blind readers
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
# Shades from 0 to 1 with evenly rising lightness, so their order is visible with any kind of color vision.
_SHADES = ("", "#1d2a4d", "#234077", "#2a5a9e", "#3a7cb8", "#5fa3c7", "#97c9d0", "#d9ecd4")
_BARS = " ▁▂▃▄▅▆▇"
_ISOLATES = str.maketrans("", "", "\u2068\u2069")  # see `isolate`; many terminals draw a box for them
_ASCII = str.maketrans(
    dict(zip("←→↺⇤▪¶⤳≈∙∅·×“”─…", '<>o|#.^~*0-x""-~', strict=True))
    | {"≥": ">="}
    | {bar: str(n) for n, bar in enumerate(_BARS) if n}
)


@dataclass(frozen=True)
class _Layer:
    label: str
    kind: str
    descriptions: list[HeadDescription]
    text: int  # index of the text of its keys
    received: Tensor  # (S,) attention received, mean over heads; 1 under uniform attention with L = S
    exact: bool


def terminal(
    records: Sequence[RecordLike],
    tokens: Sequence[str],
    *,
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
    produced: Sequence[str] | None = None,
) -> RenderableType:
    """Return a rich renderable that summarizes what every head attends to. It adapts to the width of the console, and to
    consoles without colors or Unicode.

    Args:
        records: attention calls (see `regard.view.record.RecordLike`), with top weights and keys (B, H, L, k), received
            (B, H, S) and entropy (B, H, L) in nats.
        tokens: the L tokens of the queries.
        batch: the index in B that is shown.
        key_tokens: the S tokens of the keys of cross attention; `tokens` by default.
        produced: the L tokens that a decoder produces, as in `page`.

    Raises:
        ValueError: `records` is empty, or the tokens do not match them.
        ImportError: rich is not installed.

    >>> import io
    >>> from regard.watch import watch
    >>> from rich.console import Console
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> console = Console(file=io.StringIO(), width=100)
    >>> console.print(terminal(records, ["the", "cat", "sat"]))
    >>> console.file.getvalue().splitlines()[0]
    '1 layer × 2 heads over 3 tokens: what each head attends to, and what each token receives.'
    """
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError("the terminal view needs rich: pip install 'regard[look]'") from error
    layers, sides = [], check(records, tokens, key_tokens, batch, produced)
    for record, side in zip(records, sides, strict=True):
        entries = rows(record, batch)
        received = entries.received.mean(0)
        descriptions = describe_heads(record, entries, side)
        layers.append(
            _Layer(label(record, side), record.kind, descriptions, side.key_text, received, entries.received_exact)
        )
    texts = [read(tokens)] + ([] if key_tokens is None else [read(key_tokens)])
    return _Overview(layers, texts, remarks(tokens, key_tokens))


class _Overview:
    """Computes its layout when it is printed, since the width and the colors depend on the console."""

    def __init__(self, layers: list[_Layer], texts: list[list[Reading]], notes: list[str]) -> None:
        self.layers, self.texts, self.notes = layers, texts, notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        renderer = _Renderer(
            options.max_width, console.color_system is not None and not console.no_color, options.ascii_only
        )
        heads = sum(len(layer.descriptions) for layer in self.layers)
        yield renderer.plain(self._intro(heads))
        yield renderer.plain("")
        if heads > _MAX_CELLS:
            yield from renderer.lines_of_layers(self.layers)
            yield renderer.plain("")
            yield from self._received(renderer)
        else:
            short = all(renderer.lines(text) <= _MAX_LINES for text in self.texts)
            for layer in self.layers:
                yield renderer.rule(layer.label)
                if short:
                    yield renderer.shaded(self.texts[layer.text], layer.received)
                yield from renderer.cells(layer.descriptions)
                yield renderer.largest(self.texts[layer.text], layer)
                yield Text()
            if not short:
                yield from self._received(renderer)
        yield from renderer.legend({head.pattern for layer in self.layers for head in layer.descriptions})
        for note in self.notes:
            yield renderer.plain(note, "yellow")

    def _intro(self, heads: int) -> str:
        counts = {len(layer.descriptions) for layer in self.layers}
        many = len(self.layers)
        shape = f"{many} layer{'s' * (many > 1)}" + (
            f" × {counts.pop()} heads" if len(counts) == 1 else f", {heads} heads"
        )
        length = " and ".join(str(len(text)) for text in self.texts)
        return f"{shape} over {length} tokens: what each head attends to, and what each token receives."

    def _received(self, renderer: _Renderer) -> Iterator[Text]:
        """Yield the text shaded by the attention it receives in the first, the middle and the last layer; a long text is
        shaded once, for all layers.
        """
        for index, text in enumerate(self.texts):
            layers = [layer for layer in self.layers if layer.text == index]
            if not layers:
                continue
            if renderer.lines(text) > 2 * _MAX_LINES or len(layers) < 4:
                total = sum((layer.received for layer in layers[1:]), start=layers[0].received)
                yield renderer.rule(f"attention received, sum of {len(layers)} layers")
                yield renderer.shaded(text, total)
                yield renderer.plain("")
                continue
            for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
                yield renderer.rule(f"attention received in {layer.label}")
                yield renderer.shaded(text, layer.received)
                yield renderer.plain("")


@dataclass(frozen=True)
class _Renderer:
    """Renders for the capabilities of a console. Tokens become rich Text and never markup, so brackets are kept."""

    width: int
    color: bool
    ascii: bool

    @property
    def overflow(self) -> Literal["crop", "ellipsis"]:
        return "crop" if self.ascii else "ellipsis"

    def plain(self, text: str, style: str = "") -> Text:
        from rich.text import Text

        return Text(self.encodable(text), style=style)

    def encodable(self, text: str) -> str:
        text = text.translate(_ISOLATES)
        if not self.ascii:
            return text
        plain = text.replace(" → ", " -> ").translate(_ASCII)
        return plain.encode("ascii", "backslashreplace").decode("ascii")

    def rule(self, name: str) -> Text:
        line = self.plain(name, "bold")
        line.append(self.encodable(" " + "─" * max(0, self.width - line.cell_len - 1)), style="not bold dim default")
        return line

    def lines(self, text: list[Reading]) -> int:
        from rich.cells import cell_len

        extra = 1 if self.color else 2
        return math.ceil(sum(cell_len(r.text) + extra * (not r.continues) for r in text) / max(1, self.width - 2))

    def shaded(self, text: list[Reading], amount: Tensor) -> Text:
        """Return the text with each token shaded by its amount; without colors, each is followed by a bar."""
        from rich.text import Text

        line = Text(overflow="fold")
        # Special tokens often receive ten times as much as any word: the scale is relative to the largest word.
        amounts = [max(0.0, a) for a, r in zip(amount.tolist(), text, strict=True) if not r.marker]
        most = max(amounts, default=0.0) or max(float(amount.max()), 1e-9)
        for n, reading in enumerate(text):
            share = min(1.0, max(0.0, float(amount[n])) / most)
            level = round(share * (len(_SHADES) - 1))
            if n and not reading.continues:
                line.append(" ")
            word = self.encodable(reading.text)
            if self.color:
                line.append(word, style=_shade(level) if level else "")
            else:
                line.append(word + self.encodable(_BARS[level]).strip())
        return line

    def cells(self, descriptions: list[HeadDescription]) -> Iterator[Text]:
        """Yield lines of cells, one per head, in row-major order; the columns are the same in every layer."""
        from rich.text import Text

        columns = max(1, min(self.width // _CELL_WIDTH, len(descriptions), 6))
        columns = math.ceil(
            len(descriptions) / math.ceil(len(descriptions) / columns)
        )  # as few as possible without another line
        width = self.width // columns
        for start in range(0, len(descriptions), columns):
            line = Text(no_wrap=True, overflow=self.overflow)
            for head in range(start, min(start + columns, len(descriptions))):
                cell = self.cell(head, descriptions[head], width - 1)
                cell.pad_right(width - cell.cell_len)
                line.append_text(cell)
            line.rstrip()
            yield line

    def cell(self, head: int, description: HeadDescription, width: int) -> Text:
        text = description.text
        if description.pattern == "wide" and description.entropy is not None and len(text) + 5 > width:
            text = f"broad {description.entropy:.1f}/{description.max_entropy:.1f}"
        cell = self.plain(f"{head:>2} ")
        cell.stylize("dim")
        cell.append(self.encodable(description.symbol), style=f"bold {_COLORS[description.pattern]}")
        quiet = description.pattern in ("separator", "first", "punctuation", "wide", "none")
        rest = self.plain(f" {text}")
        if cell.cell_len + rest.cell_len > width:  # cut a long token, and keep the number
            name, number = rest.plain.rsplit(" ", 1)
            rest = self.plain(name)
            rest.truncate(max(1, width - cell.cell_len - len(number) - 1), overflow=self.overflow)
            rest.append(f" {number}")
        rest.stylize("dim" if quiet else "not dim")
        return cell.append_text(rest)

    def largest(self, text: list[Reading], layer: _Layer) -> Text:
        count = min(4 if self.width < 100 else 6, len(text))
        amounts, positions = layer.received.topk(count)
        sign = "" if layer.exact else "≥"
        entries = [f"{text[p].text} {sign}{a:.1f}" for a, p in zip(amounts.tolist(), positions.tolist(), strict=True)]
        line = self.plain("   received most: " + " · ".join(entries), "dim")
        line.no_wrap, line.overflow = True, self.overflow
        return line

    def lines_of_layers(self, layers: list[_Layer]) -> Iterator[Text]:
        """Yield one line per layer: its name, a symbol for every head, and descriptions of the most informative heads."""
        from rich.text import Text

        names = [layer.label.replace("layer ", "") if layer.kind != "cross" else layer.label for layer in layers]
        name_width = max(len(name) for name in names)
        symbols = min(max(len(layer.descriptions) for layer in layers), self.width // 3)
        for name, layer in zip(names, layers, strict=True):
            line = Text(no_wrap=True, overflow=self.overflow)
            line.append(self.encodable(name).rjust(name_width) + " ", style="dim")
            for description in layer.descriptions[:symbols]:
                line.append(self.encodable(description.symbol), style=_COLORS[description.pattern])
            line.pad_right(name_width + 1 + symbols - line.cell_len)
            for head, description in _most_informative(layer.descriptions):
                words = self.plain("  ")
                words.append(f"{head} ", style="dim")
                words.append(self.encodable(description.text))
                if line.cell_len + words.cell_len > self.width:
                    continue
                line.append_text(words)
            yield line

    def legend(self, patterns: set[str]) -> Iterator[Text]:
        """Yield the legend of symbols and shades, wrapped between entries."""
        from rich.text import Text

        line = Text()
        for pattern, (symbol, name) in HABITS.items():
            if pattern not in patterns:
                continue
            name = {"pair": "strongest link", "wide": "broad, entropy in nats"}.get(pattern, name)
            entry = self.plain(symbol, f"bold {_COLORS[pattern]}")
            entry.append(self.encodable(f" {name}   "), style="not bold dim default")
            if line.cell_len + entry.cell_len - 3 > self.width:
                yield line
                line = Text()
            line.append_text(entry)
        yield line
        scale = self.plain("attention received: less ", "dim")
        for level in range(1, len(_SHADES)):
            block = "  " if self.color else self.encodable(_BARS[level])
            scale.append(block, style=f"not dim {_shade(level)}" if self.color else "")
        scale.append(" more")
        yield scale


def shade(share: float) -> str:
    """Return the rich style whose background shows a share from 0 to 1.

    >>> shade(0.0), shade(1.0)
    ('', '#10141f on #d9ecd4')
    """
    level = round(min(max(share, 0.0), 1.0) * (len(_SHADES) - 1))
    return _shade(level) if level else ""


def _shade(level: int) -> str:
    return f"{'#10141f' if level >= 5 else '#ffffff'} on {_SHADES[level]}"


def _most_informative(descriptions: list[HeadDescription]) -> list[tuple[int, HeadDescription]]:
    """Return (head, description) by decreasing interest, with the first head of each pattern only."""
    ranked = sorted(enumerate(descriptions), key=lambda pair: -pair[1].interest)
    seen: set[str] = set()
    chosen = []
    for head, description in ranked:
        name = description.text.rsplit(" ", 1)[0] if description.pattern != "wide" else "wide"
        if name not in seen:
            seen.add(name)
            chosen.append((head, description))
    return chosen
