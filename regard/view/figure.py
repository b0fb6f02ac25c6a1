"""Figures of attention by matplotlib, for papers and notebooks: one head, an alignment, all heads.

Weights are shown by their square root, on one scale from 0 to 1, so that figures compare. What a record's list leaves out
is drawn as unknown, with strokes aslant, and never as zero; what may not be attended is dotted. A long text is pooled by
the largest weight, so memory is that of the record.

The figures are free of pyplot: `figure.savefig("head.pdf")` writes one, a notebook shows one after `%matplotlib inline`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.check import is_int, wrong
from regard.view.record import Record, Rows, Sides, check, label, rows
from regard.view.token import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RAMP = ("#eef4fb", "#9fcdf5", "#5aa0e6", "#3168c4", "#23398b", "#161850")  # the page's, of frontend/colour.js
_GAP, _KNOWN, _UNKNOWN, _BARRED = range(4)
_CLEAR, _WHITE, _GREY, _STROKE = "#ffffff00", "#ffffff", "#f3f4f6", "#b9bfcb"
_DPI = 150
_CELLS = 512  # of a matrix, a side
_SMALL, _BARS = 40, 32  # cells and bars of a head among all heads, a side
_LEAST = 0.125  # inches that a token takes beside the next
_LETTERS = 16  # of a token; a longer one is cut
# Fonts beside the default one, where they are installed.
_SCRIPTS = ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei", "Noto Sans")


def heatmap(
    record: Record, tokens: Sequence[str] | None = None, *, head: int, batch: int = 0,
    key_tokens: Sequence[str] | None = None, ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """One head as a matrix (L, S): queries down, keys across.

    Args:
        record: one call of attention, with `top` (B, H, L, k).
        tokens: all S of self-attention, or the L queries of cross attention; by default their numbers. Where they have no
            room, some numbers stand for them.
        head, batch: which of H and of B.
        key_tokens: the S tokens that cross attention looks at; `tokens` by default.
        ax: where to draw it, as large as they are; by default in a figure of its own, as large as it needs.

    Raises:
        ValueError, TypeError, ImportError: an argument does not fit, or matplotlib is missing; nothing has been drawn then.
    """
    _need_matplotlib()
    side = _sides("record", record, batch, head, tokens, key_tokens)
    if ax is not None and not hasattr(ax, "imshow"):
        raise wrong("ax", ax, "axes of matplotlib", False)
    seen = rows(record, batch, [head])
    title = f"{label(record, side).capitalize()}, head {head}"
    return _matrix(seen, (side.queries, side.keys), ("queries", "keys"), title, ax)


def alignment(
    record_or_weights: Record | Tensor, tokens: Sequence[str], key_tokens: Sequence[str], *, head: int | None = None,
    batch: int = 0,
) -> Figure:  # fmt: skip
    """Which source tokens each target token looks at: a matrix (L, S), the target down, the source across.

    Source: "Neural Machine Translation by Jointly Learning to Align and Translate", Bahdanau et al. (2015), figure 3.

    Args:
        record_or_weights: one call of attention, with `top` (B, H, L, k), or weights (L, S).
        tokens, key_tokens: the L tokens of the target, which are the queries, and the S of the source, which are the keys.
        head, batch: which of H and of B; by default the mean of all heads, of the weights that are listed.

    Raises: as `heatmap` does.
    """
    _need_matplotlib()
    _check_tokens(tokens=tokens, key_tokens=key_tokens)
    texts, names = (tokens, key_tokens), ("target", "source")
    if isinstance(record_or_weights, Tensor):
        seen = _given(record_or_weights, (len(tokens), len(key_tokens)), head, batch)
        return _matrix(seen, texts, names, "")
    record = record_or_weights
    side = _sides("record_or_weights", record, batch, 0 if head is None else head)
    given, sizes = (len(tokens), len(key_tokens)), (record.queries, record.keys)
    if given != sizes:
        raise ValueError(
            f"tokens and key_tokens have {given} entries: expected {sizes}, (L, S) of record {record.name!r}"
        )
    seen = rows(record, batch, None if head is None else [head])
    title = f"{label(record, side).capitalize()}, " + ("mean of heads" if head is None else f"head {head}")
    return _matrix(seen, texts, names, title)


def heads(records: Sequence[Record], *, batch: int = 0, show: str = "pattern") -> Figure:
    """All heads: a row a call of attention, a column a head.

    Args:
        records: calls of attention, with `top` (B, H, L, k), and `received` (B, H, S) and `entropy` (B, H, L) if recorded.
        batch: which of B.
        show: "pattern", the matrix of each head; "received", the share of all attention that each key gets, as bars;
            "entropy", how widely a head looks, in nats; "distance", how many tokens away. The last two are a number a head,
            the mean over the queries that attend to anything.

    Raises: as `heatmap` does.
    """
    _need_matplotlib()
    if not isinstance(records, Sequence) or not len(records):
        empty = isinstance(records, Sequence)
        raise wrong("records", [] if empty else records, "one or more records of regard.watch", empty)
    for n, record in enumerate(records):
        _sides(f"records[{n}]", record, batch, 0)
    if show not in ("pattern", "received", "entropy", "distance"):
        raise wrong("show", show, "'pattern', 'received', 'entropy' or 'distance'", isinstance(show, str))
    count = max(record.heads for record in records)
    side = max(min(0.62, max(0.2, 8 / count)), min(1.8, 4 / count))
    return (_table if show in ("entropy", "distance") else _mosaic)(records, batch, show, count, side)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'regard[watch]'") from error


def _check_tokens(**texts: object) -> None:
    for name, tokens in texts.items():
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(isinstance(t, str) for t in tokens):
            raise wrong(name, tokens, "a sequence of strings, one a token", False)


def _sides(
    name: str, record: Record, batch: object, head: object,
    tokens: Sequence[str] | None = None, key_tokens: Sequence[str] | None = None,
) -> Sides:  # fmt: skip
    """The two sides of a record, if it is one and has such a head; numbers stand for tokens that are not given."""
    if not all(hasattr(record, part) for part in ("top", "heads", "queries", "keys", "kind")):
        raise wrong(name, record, "one record of regard.watch, such as seen[0]", False)
    if not is_int(batch):
        raise wrong("batch", batch, "an int", False)
    if not is_int(head) or not 0 <= head < record.heads:
        raise wrong("head", head, f"an int from 0 to {record.heads - 1}: the heads of {record.name!r}", is_int(head))
    cross = record.kind == "cross"
    if tokens is None:
        tokens = [str(n) for n in range(record.queries if cross else record.keys)]
        key_tokens = [str(n) for n in range(record.keys)] if key_tokens is None and cross else key_tokens
    _check_tokens(tokens=tokens, key_tokens=tokens if key_tokens is None else key_tokens)
    return check([record], tokens, key_tokens, batch)[0]


def _given(weights: Tensor, sizes: tuple[int, int], head: object, batch: object) -> Rows:
    """Weights (L, S), all of which are known."""
    if tuple(weights.shape) != sizes or not weights.numel():
        raise wrong("record_or_weights", weights, f"(L, S) = {sizes}, as many as tokens and key_tokens", True)
    if head is not None or batch != 0:
        raise ValueError(f"head is {head!r} and batch is {batch!r}; expected None and 0 beside weights (L, S)")
    weights = weights.detach().cpu().float()[None]
    if not bool(((weights >= 0) & (weights <= 1.001)).all()):
        raise ValueError(f"record_or_weights is from {weights.min():.3g} to {weights.max():.3g}; expected 0 to 1")
    keys, listed = torch.arange(sizes[1]).expand(weights.shape), torch.ones_like(weights, dtype=torch.bool)
    allowed, rest = torch.full(sizes[:1], sizes[1]), torch.zeros(1, sizes[0])
    return Rows(weights, keys, listed, allowed, listed[..., 0], rest, None, weights.sum(1), True, 0)


def _mean(seen: Rows) -> Rows:
    """The mean of all heads as if it were one. Where not all of them list a key, its mean is a lower bound."""
    beyond = int(seen.received.shape[-1])
    keys, order = seen.keys.masked_fill(~seen.listed, beyond).transpose(0, 1).flatten(1).sort(-1)  # (L, H k)
    weights = (seen.weights / len(seen.weights)).transpose(0, 1).flatten(1).gather(-1, order)
    place = (keys.diff(dim=-1, prepend=keys[:, :1]) > 0).cumsum(-1)
    merged = torch.zeros_like(weights).scatter_add_(1, place, weights)[None]
    keys = torch.full_like(keys, beyond).scatter_(1, place, keys)[None]
    return replace(seen, weights=merged, keys=keys, listed=keys < beyond, complete=seen.complete.all(0, keepdim=True))


def _cells(seen: Rows, down: int, across: int) -> tuple[Tensor, Tensor]:
    """The largest listed weight of each cell of down x across tokens (H, h, w), NaN where none is, and what cells are."""
    H, queries, keys = *seen.complete.shape, int(seen.received.shape[-1])
    high, wide = -(-queries // down), -(-keys // across)
    row = torch.arange(queries) // down
    place = (row[:, None] * wide + seen.keys.clamp(0, keys - 1) // across).flatten(1)
    weights = seen.weights.masked_fill(~seen.listed, -1.0).flatten(1)
    best = torch.full((H, high * wide), -1.0).scatter_reduce_(1, place, weights, "amax").view(H, high, wide)
    # Of a row that is not complete, all keys are unknown that it may attend and does not list.
    unknown = torch.where(seen.complete, 0, seen.allowed)
    reach = torch.zeros(H, high, dtype=torch.long).scatter_reduce_(1, row.expand(H, -1), unknown, "amax")
    kinds = torch.where(torch.arange(wide) * across < reach[..., None], _UNKNOWN, _BARRED)
    return best.masked_fill(best < 0, math.nan), kinds.masked_fill(best >= 0, _KNOWN)


def _bars(seen: Rows) -> tuple[Tensor, Tensor]:
    """A bar each key or part of a long text, as high as the square root of its share (H, h, w), and 0 above it."""
    H, keys = seen.received.shape
    step = -(-keys // _BARS)
    asking = (seen.weights.sum(-1) > 0).sum(-1, keepdim=True).clamp(min=1)
    part = (torch.arange(keys) // step).expand(H, -1)
    shares = torch.zeros(H, -(-keys // step)).scatter_add_(1, part, seen.received / asking)[:, None].clamp(0, 1)
    bars = torch.where(torch.arange(_SMALL, 0, -1)[:, None] <= (_SMALL * shares.sqrt()).ceil(), shares, 0.0)
    return bars, torch.full(bars.shape, _KNOWN)


def _matrix(
    seen: Rows, texts: tuple[Sequence[str], Sequence[str]], names: tuple[str, str], title: str, ax: Any = None
) -> Figure:
    """The rows of one head, or the mean of several, in axes or in a figure of their own."""
    own, sizes = ax is None, (len(texts[0]), len(texts[1]))
    inches = _room(sizes) if own else tuple(ax.get_window_extent().size[::-1] / ax.figure.dpi)
    # No more cells than dots: else a thin line would be lost between two of them.
    dots = [max(1, min(_CELLS, round(side * (_DPI if own else ax.figure.dpi)))) for side in inches]
    step = max(-(-n // most) for n, most in zip(sizes, dots, strict=True))
    (weights,), (kinds,) = _cells(_mean(seen), step, step)
    known = [f"the largest recorded of {min(step, sizes[0])} × {min(step, sizes[1])}"] if step > 1 else []
    if len(seen.weights) > 1 and not bool(seen.complete.all()):
        known.append("a mean of what is recorded: at least so much")
    # What is not listed is at most the least that is, and at most the rest.
    least = seen.weights.masked_fill(~seen.listed, math.inf).amin(-1)
    most = float(torch.minimum(least, seen.rest).masked_fill(seen.complete, 0.0).mean(0).max())
    unknown = f"not recorded: at most {math.ceil(1000 * most) / 1000:.3g} each"
    box = (-0.5, weights.shape[1] * step - 0.5, weights.shape[0] * step - 0.5, -0.5)
    ax = _paint(ax, weights, kinds, box, inches, title=title, across=names[1], known=", ".join(known), unknown=unknown)
    ax.set(xlim=(-0.5, sizes[1] - 0.5), ylim=(sizes[0] - 0.5, -0.5))
    ax.set_ylabel(names[0], fontsize=9)
    _tick(ax.yaxis, texts[0], seen.offset, inches[0])
    _tick(ax.xaxis, texts[1], 0, inches[1])
    return _fitted(ax, inches) if own else ax.figure.figure  # the root, where the axes are in a part of it


def _mosaic(records: Sequence[Record], batch: int, show: str, count: int, side: float) -> Figure:
    """A tile a head, all in one image: its matrix, or bars of what its keys receive."""
    tiles, exact = [], True
    for record in records:
        seen = rows(record, batch)
        steps = -(-record.queries // _SMALL), -(-record.keys // _SMALL)
        tiles.append(_bars(seen) if show == "received" else _cells(seen, *steps))
        exact = exact and seen.received_exact
    # A whole number of dots a cell, down and across.
    most = [max(weights.shape[axis] for weights, _ in tiles) for axis in (1, 2)]
    high, wide = (n * max(1, round(0.93 * side * _DPI / n)) for n in most)
    gap = max(2, round(0.07 * side * _DPI))
    values = torch.full((len(records), high + gap, count, wide + gap), math.nan)
    kinds = torch.full(values.shape, _GAP)
    for n, tile in enumerate(tiles):
        y, x = (torch.arange(m) * tile[0].shape[axis] // m for m, axis in ((high, 1), (wide, 2)))
        place = n, slice(gap // 2, gap // 2 + high), slice(len(tile[0])), slice(gap // 2, gap // 2 + wide)
        for whole, part in zip((values, kinds), tile, strict=True):
            whole[place] = part[:, y[:, None], x].transpose(0, 1)
    values, kinds = (whole.flatten(2).flatten(0, 1) for whole in (values, kinds))
    cell = (high + gap) / _DPI, (wide + gap) / _DPI
    if show == "pattern":
        known = "the largest recorded of each part" if any(max(r.queries, r.keys) > _SMALL for r in records) else ""
        return _grid(records, values, kinds, cell, title="Queries down, keys across", known=known)
    told = [f"a bar is one of {_BARS} parts at most"] if any(record.keys > _BARS for record in records) else []
    told += [] if exact else ["a sum of what is recorded: at least so much"]
    return _grid(records, values, kinds, cell, title="Attention received", name="share of all", known=", ".join(told))


def _table(records: Sequence[Record], batch: int, show: str, count: int, side: float) -> Figure:
    """One number a head."""
    from matplotlib.colors import Normalize

    values = torch.full((len(records), count), math.nan)
    kinds = torch.full(values.shape, _GAP)
    for n, record in enumerate(records):
        seen, found = rows(record, batch), torch.full((record.heads,), math.nan)
        asked = seen.weights.sum(-1)
        if show == "entropy" and seen.entropy is not None:
            found = (seen.entropy * (asked > 0)).sum(-1) / (asked > 0).sum(-1)
        elif show == "distance" and record.kind != "cross":
            apart = (seen.keys - seen.offset - torch.arange(record.queries)[:, None]).abs()
            found = (seen.weights * apart).sum((-1, -2)) / asked.sum(-1)
        values[n, : record.heads] = found
        kinds[n, : record.heads] = torch.where(found.isnan(), _UNKNOWN, _KNOWN)
    if not bool((kinds == _KNOWN).any()):
        expected = "records of regard.watch(..., entropy=True)" if show == "entropy" else "records of self-attention"
        raise ValueError(f"show is {show!r}, which no record tells; expected {expected}, or another show")
    most = float(values[kinds == _KNOWN].max())
    how = {"title": "How far heads look", "name": "tokens, by what is recorded", "unknown": "cross attention has none"}
    if show == "entropy":
        most = math.log(max(record.keys for record in records))
        how = {"title": "How widely heads look", "name": "entropy in nats", "unknown": "not recorded"}
    norm = Normalize(0, most or 1)
    figure = _grid(records, values, kinds, (side, side), norm=norm, ticks=None, **how)
    for n, head in (kinds == _KNOWN).nonzero().tolist() if side >= 0.3 else ():
        number = float(values[n, head])
        ink = "white" if norm(number) > 0.55 else "black"
        text = f"{number:.{1 if number < 9.95 else 0}f}"
        figure.axes[0].text(head, n, text, ha="center", va="center", color=ink, fontsize=min(8, 20 * side))
    return figure


def _grid(records: Sequence[Record], values: Tensor, kinds: Tensor, inches: Sequence[float], **how: Any) -> Figure:
    """A figure with a row a record and a column a head, each so many `inches` high and wide."""
    count = max(record.heads for record in records)
    size = inches[0] * len(records), inches[1] * count
    ax = _paint(None, values, kinds, (-0.5, count - 0.5, len(records) - 0.5, -0.5), size, across="head", **how)
    ax.set_yticks(range(len(records)), [label(record, Sides(0, 0, (), ())) for record in records])
    ax.set_xticks(range(count))
    for axis, lines in ((ax.xaxis, count), (ax.yaxis, len(records))):
        axis.set_ticks([n - 0.5 for n in range(1, lines)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return _fitted(ax, size)


def _paint(
    ax: Any, values: Tensor, kinds: Tensor, box: tuple[float, ...], inches: tuple[float, ...], *, title: str, across: str,
    name: str = "weight", norm: Any = None, ticks: Sequence[float] | None = (0, 0.05, 0.25, 0.5, 1), known: str = "",
    unknown: str = "not recorded",
) -> Any:  # fmt: skip
    """Values (h, w) as colours, textures where there are none, a scale, a legend: in given axes or in a new figure's."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ax = Figure(dpi=_DPI, layout="constrained").add_subplot() if ax is None else ax
    if bool((kinds > _KNOWN).any()):
        dots = [max(1, round(side * _DPI / n)) for side, n in zip(inches, kinds.shape, strict=True)]
        fine = kinds.repeat_interleave(dots[0], 0).repeat_interleave(dots[1], 1)
        y, x = torch.arange(fine.shape[0])[:, None], torch.arange(fine.shape[1])
        stroke = torch.where(fine == _UNKNOWN, (x + y) % 12 < 1, (x % 10 < 2) & (y % 10 < 2)).long()
        paints = 255 * to_rgba_array([_CLEAR] * 4 + [_GREY, _STROKE, _WHITE, _STROKE])  # of each kind ground and stroke
        ax.imshow(paints.astype("uint8")[(2 * fine + stroke).numpy()], extent=box, aspect="auto")
    ramp = LinearSegmentedColormap.from_list("regard", _RAMP).with_extremes(bad=_CLEAR)
    norm = norm or PowerNorm(0.5, 0, 1)
    shown = ax.imshow(values.numpy(), cmap=ramp, norm=norm, extent=box, interpolation="nearest", aspect="auto")
    beside, low = ax.inset_axes((1 + 0.12 / inches[1], 0, 0.1 / inches[1], 1)), inches[0] < 0.8
    scale = ax.figure.colorbar(shown, cax=beside, ticks=(norm.vmin, norm.vmax) if low else ticks, format="{x:.3g}")
    scale.set_label("" if low else name, fontsize=8)
    scale.outline.set_visible(False)
    beside.tick_params(labelsize=8, length=2)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(across, fontsize=9)
    ax.xaxis.set(ticks_position="top", label_position="top")
    marks = [(_RAMP[3], "", known)] if known else []
    marks += [(_GREY, "////", unknown)] if bool((kinds == _UNKNOWN).any()) else []
    marks += [(_WHITE, "....", "may not be attended")] if bool((kinds == _BARRED).any()) else []
    if marks:
        ax.legend(
            handles=[Patch(fc=ground, ec=_STROKE, hatch=hatch, lw=0, label=text) for ground, hatch, text in marks],
            loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.7, borderpad=0, frameon=False, fontsize=8,
            ncols=1 if inches[1] < 4 else len(marks), handlelength=1.4, columnspacing=1.5,
        )  # fmt: skip
    return ax


def _tick(axis: Any, tokens: Sequence[str], offset: int, inches: float) -> None:
    """Tokens beside their rows or columns where they have room, else some of their numbers."""
    from matplotlib import font_manager, rcParams

    room = inches / len(tokens)
    if room < _LEAST:
        most = max(2, min(8, int(2 * inches)))
        step = next(s for e in range(9) for s in (10**e, 2 * 10**e, 5 * 10**e) if len(tokens) <= s * most)
        places = range(-(-offset // step) * step, offset + len(tokens), step)
        axis.set_ticks([place - offset for place in places], [str(place) for place in places], fontsize=8)
        return
    texts = [reading.text.encode("utf-8", "replace").decode("utf-8") for reading in read(tokens)]
    texts = [text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…" for text in texts]
    installed = set(font_manager.get_font_names()).intersection(_SCRIPTS)
    fonts = [*rcParams["font.family"], *sorted(installed, key=_SCRIPTS.index)]  # a letter is of the first that has it
    turned = 90 if axis.axis_name == "x" and any(len(text) > 2 for text in texts) else 0
    axis.set_ticks(range(len(texts)), texts, fontsize=min(9, 46 * room), fontfamily=fonts, rotation=turned)
    for text in axis.get_ticklabels():
        text.set(parse_math=False, usetex=False)  # it is text, and no formula
    axis.set_ticks([n + 0.5 for n in range(len(texts) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5)
    axis.set_tick_params(which="both", length=0)


def _room(sizes: tuple[int, int]) -> tuple[float, ...]:
    """Inches of a matrix, high and wide: a whole number of dots a cell, and room for tokens where they are few."""
    step = -(-max(sizes) // _CELLS)
    cells = -(-max(sizes) // step)
    dots = min(max(round(5.8 * _DPI / cells), 21 if cells <= 64 else 1), max(51, 240 // cells))
    return tuple(max(least, -(-size // step) * dots / _DPI) for least, size in zip((0.8, 1.2), sizes, strict=True))


def _fitted(ax: Any, inches: tuple[float, ...]) -> Figure:
    """The figure, made so large that its axes are as high and wide as they shall be."""
    figure: Figure = ax.figure
    layout: Any = figure.get_layout_engine()
    figure.set_size_inches(inches[1] + 4, inches[0] + 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that no font has: it is told when the figure is drawn
        for _ in range(2):
            layout.execute(figure)
            wide, high = figure.get_size_inches() * (1 - ax.get_position().size)  # what stands around the axes
            figure.set_size_inches(inches[1] + wide, inches[0] + high)
    return figure
