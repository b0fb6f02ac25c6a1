"""Matplotlib figures of attention, for papers and notebooks: one head, an alignment, all heads.

Colors show the square root of the weights, on one scale from 0 to 1, so that figures can be compared. Weights that were
not recorded are hatched, never drawn as zero; masked positions are dotted. Long texts are max-pooled, so the memory is
that of the record.

The figures do not use pyplot: `figure.savefig("head.pdf")` writes one, and a notebook shows one after
`%matplotlib inline`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.check import error, is_int
from regard.view.plot import DPI, GAP, KNOWN, MASKED, MAX_CELLS, UNKNOWN, fit_axes, label_ticks, matrix_size, paint
from regard.view.record import RecordLike, Rows, Sides, check, label, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TILE_CELLS, _TILE_BARS = 40, 32  # cells per side and bars of a head in the grid of all heads


def heatmap(
    record: RecordLike, tokens: Sequence[str] | None = None, *, head: int, batch: int = 0,
    key_tokens: Sequence[str] | None = None, ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """Draw one head as a matrix (L, S): one row per query, one column per key.

    Args:
        record: one attention call, with `top` (B, H, L, k).
        tokens: the S tokens of self-attention, or the L tokens of the queries of cross attention; by default their
            indices. If the labels do not fit, some indices are shown instead.
        head, batch: the indices in H and in B.
        key_tokens: the S tokens of the keys of cross attention; `tokens` by default.
        ax: the axes to draw in; by default those of a new figure of the size that the matrix needs.

    Raises:
        ValueError, TypeError: an argument is invalid; nothing has been drawn then.
        ImportError: matplotlib is not installed.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> axes = heatmap(records[0], ["the", "cat", "sat"], head=1).axes[0]
    >>> axes.get_title("left"), [label.get_text() for label in axes.get_yticklabels()]
    ('Layer 0, head 1', ['the', 'cat', 'sat'])
    >>> weights = torch.as_tensor(axes.images[-1].get_array())
    >>> bool(torch.allclose(weights.sort(descending=True).values, records[0].top.weights[0, 1]))
    True
    """
    _need_matplotlib()
    side = _sides("record", record, batch, head, tokens, key_tokens)
    if ax is not None and not hasattr(ax, "imshow"):
        raise error("ax", ax, "axes of matplotlib", False)
    entries = rows(record, batch, [head])
    title = f"{label(record, side).capitalize()}, head {head}"
    return _matrix(entries, (side.queries, side.keys), ("queries", "keys"), title, ax)


def alignment(
    record_or_weights: RecordLike | Tensor, tokens: Sequence[str], key_tokens: Sequence[str], *, head: int | None = None,
    batch: int = 0,
) -> Figure:  # fmt: skip
    """Draw an alignment as a matrix (L, S): one row per target token, one column per source token.

    Source: "Neural Machine Translation by Jointly Learning to Align and Translate", Bahdanau et al. (2015), figure 3.

    Args:
        record_or_weights: one attention call, with `top` (B, H, L, k), or weights (L, S).
        tokens, key_tokens: the L tokens of the target (queries), and the S tokens of the source (keys).
        head, batch: the indices in H and in B; by default the mean of all heads, over the listed weights.

    Raises:
        ValueError, TypeError, ImportError: as in `heatmap`.

    >>> axes = alignment(torch.tensor([[0.9, 0.1]]), ["le"], ["the", "cat"]).axes[0]
    >>> axes.get_ylabel(), [label.get_text() for label in axes.get_xticklabels()]
    ('target', ['the', 'cat'])
    >>> [f"{weight:.1f}" for weight in axes.images[-1].get_array()[0]]
    ['0.9', '0.1']
    """
    _need_matplotlib()
    _check_tokens(tokens=tokens, key_tokens=key_tokens)
    texts, names = (tokens, key_tokens), ("target", "source")
    if isinstance(record_or_weights, Tensor):
        entries = _rows_of_weights(record_or_weights, (len(tokens), len(key_tokens)), head, batch)
        return _matrix(entries, texts, names, "")
    record = record_or_weights
    side = _sides("record_or_weights", record, batch, 0 if head is None else head)
    given, sizes = (len(tokens), len(key_tokens)), (record.queries, record.keys)
    if given != sizes:
        raise ValueError(
            f"tokens and key_tokens have {given} entries: expected {sizes}, (L, S) of record {record.name!r}"
        )
    entries = rows(record, batch, None if head is None else [head])
    title = f"{label(record, side).capitalize()}, " + ("mean of heads" if head is None else f"head {head}")
    return _matrix(entries, texts, names, title)


def heads(records: Sequence[RecordLike], *, batch: int = 0, show: str = "pattern") -> Figure:
    """Draw all heads in a grid: one row per attention call, one column per head.

    Args:
        records: attention calls, with `top` (B, H, L, k), and `received` (B, H, S) and `entropy` (B, H, L) if recorded.
        batch: the index in B.
        show: "pattern", the matrix of each head; "received", the share of all attention that each key receives, as bars;
            "entropy", in nats; "distance", between queries and keys in tokens. The last two are one number per head, the
            mean over the queries that attend to any key.

    Raises:
        ValueError, TypeError, ImportError: as in `heatmap`.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> figure = heads(records, show="entropy")
    >>> drawn = torch.as_tensor(figure.axes[0].images[-1].get_array())
    >>> weights = records[0].top.weights[0]
    >>> bool(torch.allclose(drawn[0], -(weights * weights.log()).sum(-1).mean(-1)))
    True
    """
    _need_matplotlib()
    if not isinstance(records, Sequence) or not len(records):
        empty = isinstance(records, Sequence)
        raise error("records", [] if empty else records, "one or more records of regard.watch", empty)
    for n, record in enumerate(records):
        _sides(f"records[{n}]", record, batch, 0)
    if show not in ("pattern", "received", "entropy", "distance"):
        raise error("show", show, "'pattern', 'received', 'entropy' or 'distance'", isinstance(show, str))
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
            raise error(name, tokens, "a sequence of strings, one per token", False)


def _sides(
    name: str, record: RecordLike, batch: object, head: object,
    tokens: Sequence[str] | None = None, key_tokens: Sequence[str] | None = None,
) -> Sides:  # fmt: skip
    """Check the arguments and return the sides of a record; without tokens, indices are used instead."""
    if not all(hasattr(record, attribute) for attribute in ("top", "heads", "queries", "keys", "kind")):
        raise error(name, record, "one record of regard.watch, such as recording[0]", False)
    if not is_int(batch):
        raise error("batch", batch, "an integer", False)
    if not is_int(head) or not 0 <= head < record.heads:
        raise error(
            "head", head, f"an integer from 0 to {record.heads - 1}: the heads of {record.name!r}", is_int(head)
        )
    cross = record.kind == "cross"
    if tokens is None:
        tokens = [str(n) for n in range(record.queries if cross else record.keys)]
        key_tokens = [str(n) for n in range(record.keys)] if key_tokens is None and cross else key_tokens
    _check_tokens(tokens=tokens, key_tokens=tokens if key_tokens is None else key_tokens)
    return check([record], tokens, key_tokens, batch)[0]


def _rows_of_weights(weights: Tensor, sizes: tuple[int, int], head: object, batch: object) -> Rows:
    """Return complete rows of given weights (L, S)."""
    if tuple(weights.shape) != sizes or not weights.numel():
        raise error("record_or_weights", weights, f"(L, S) = {sizes}, as many as tokens and key_tokens", True)
    if head is not None or batch != 0:
        raise ValueError(f"head is {head!r} and batch is {batch!r}; expected None and 0 beside weights (L, S)")
    weights = weights.detach().cpu().float()[None]
    if not bool(((weights >= 0) & (weights <= 1.001)).all()):
        raise ValueError(f"record_or_weights is from {weights.min():.3g} to {weights.max():.3g}; expected 0 to 1")
    keys, listed = torch.arange(sizes[1]).expand(weights.shape), torch.ones_like(weights, dtype=torch.bool)
    allowed, rest = torch.full(sizes[:1], sizes[1]), torch.zeros(1, sizes[0])
    return Rows(weights, keys, listed, allowed, listed[..., 0], rest, None, weights.sum(1), True, 0)


def _mean(entries: Rows) -> Rows:
    """Return the mean of all heads as one head. If not all heads list a key, its mean is a lower bound."""
    size = int(entries.received.shape[-1])
    keys, order = entries.keys.masked_fill(~entries.listed, size).transpose(0, 1).flatten(1).sort(-1)  # (L, H k)
    weights = (entries.weights / len(entries.weights)).transpose(0, 1).flatten(1).gather(-1, order)
    index = (keys.diff(dim=-1, prepend=keys[:, :1]) > 0).cumsum(-1)
    merged = torch.zeros_like(weights).scatter_add_(1, index, weights)[None]
    keys = torch.full_like(keys, size).scatter_(1, index, keys)[None]
    return replace(
        entries, weights=merged, keys=keys, listed=keys < size, complete=entries.complete.all(0, keepdim=True)
    )


def _cells(entries: Rows, down: int, across: int) -> tuple[Tensor, Tensor]:
    """Max-pool the listed weights to cells of down x across tokens (H, h, w), NaN where none is listed; and their kinds."""
    H, queries, keys = *entries.complete.shape, int(entries.received.shape[-1])
    height, width = -(-queries // down), -(-keys // across)
    row = torch.arange(queries) // down
    cell = (row[:, None] * width + entries.keys.clamp(0, keys - 1) // across).flatten(1)
    weights = entries.weights.masked_fill(~entries.listed, -1.0).flatten(1)
    best = torch.full((H, height * width), -1.0).scatter_reduce_(1, cell, weights, "amax").view(H, height, width)
    # In an incomplete row, the keys that it may attend but does not list are unknown.
    unknown = torch.where(entries.complete, 0, entries.allowed)
    reach = torch.zeros(H, height, dtype=torch.long).scatter_reduce_(1, row.expand(H, -1), unknown, "amax")
    kinds = torch.where(torch.arange(width) * across < reach[..., None], UNKNOWN, MASKED)
    return best.masked_fill(best < 0, math.nan), kinds.masked_fill(best >= 0, KNOWN)


def _bars(entries: Rows) -> tuple[Tensor, Tensor]:
    """Draw bars, one per key or bin of keys, whose height is the square root of their share (H, h, w); and their kinds."""
    H, keys = entries.received.shape
    step = -(-keys // _TILE_BARS)
    counted = (entries.weights.sum(-1) > 0).sum(-1, keepdim=True).clamp(min=1)
    bins = (torch.arange(keys) // step).expand(H, -1)
    shares = torch.zeros(H, -(-keys // step)).scatter_add_(1, bins, entries.received / counted)[:, None].clamp(0, 1)
    bars = torch.where(torch.arange(_TILE_CELLS, 0, -1)[:, None] <= (_TILE_CELLS * shares.sqrt()).ceil(), shares, 0.0)
    return bars, torch.full(bars.shape, KNOWN)


def _matrix(
    entries: Rows, texts: tuple[Sequence[str], Sequence[str]], names: tuple[str, str], title: str, ax: Any = None
) -> Figure:
    """Draw the rows of one head, or the mean of several, in given axes or in a new figure."""
    is_new, sizes = ax is None, (len(texts[0]), len(texts[1]))
    inches = matrix_size(sizes) if is_new else tuple(ax.get_window_extent().size[::-1] / ax.figure.dpi)
    # At most one cell per pixel, or a thin line could be lost between two pixels.
    pixels = [max(1, min(MAX_CELLS, round(side * (DPI if is_new else ax.figure.dpi)))) for side in inches]
    step = max(-(-n // most) for n, most in zip(sizes, pixels, strict=True))
    (weights,), (kinds,) = _cells(_mean(entries), step, step)
    known = [f"largest recorded weight of {min(step, sizes[0])} × {min(step, sizes[1])}"] if step > 1 else []
    if len(entries.weights) > 1 and not bool(entries.complete.all()):
        known.append("mean of recorded weights: a lower bound")
    # An unlisted weight is at most the smallest listed one, and at most the rest.
    smallest = entries.weights.masked_fill(~entries.listed, math.inf).amin(-1)
    most = float(torch.minimum(smallest, entries.rest).masked_fill(entries.complete, 0.0).mean(0).max())
    unknown = f"not recorded: at most {math.ceil(1000 * most) / 1000:.3g} each"
    box = (-0.5, weights.shape[1] * step - 0.5, weights.shape[0] * step - 0.5, -0.5)
    ax = paint(ax, weights, kinds, box, inches, title=title, across=names[1], known=", ".join(known), unknown=unknown)
    ax.set(xlim=(-0.5, sizes[1] - 0.5), ylim=(sizes[0] - 0.5, -0.5))
    ax.set_ylabel(names[0], fontsize=9)
    label_ticks(ax.yaxis, texts[0], entries.offset, inches[0])
    label_ticks(ax.xaxis, texts[1], 0, inches[1])
    return fit_axes(ax, inches) if is_new else ax.figure.figure  # the root figure, if the axes are in a subfigure


def _mosaic(records: Sequence[RecordLike], batch: int, show: str, count: int, side: float) -> Figure:
    """Draw one tile per head, all in one image: its matrix, or bars of the attention that its keys receive."""
    tiles, exact = [], True
    for record in records:
        entries = rows(record, batch)
        steps = -(-record.queries // _TILE_CELLS), -(-record.keys // _TILE_CELLS)
        tiles.append(_bars(entries) if show == "received" else _cells(entries, *steps))
        exact = exact and entries.received_exact
    # An integer number of pixels per cell.
    cells = [max(weights.shape[axis] for weights, _ in tiles) for axis in (1, 2)]
    height, width = (n * max(1, round(0.93 * side * DPI / n)) for n in cells)
    gap = max(2, round(0.07 * side * DPI))
    values = torch.full((len(records), height + gap, count, width + gap), math.nan)
    kinds = torch.full(values.shape, GAP)
    for n, tile in enumerate(tiles):
        y, x = (torch.arange(m) * tile[0].shape[axis] // m for m, axis in ((height, 1), (width, 2)))
        index = n, slice(gap // 2, gap // 2 + height), slice(len(tile[0])), slice(gap // 2, gap // 2 + width)
        for image, part in zip((values, kinds), tile, strict=True):
            image[index] = part[:, y[:, None], x].transpose(0, 1)
    values, kinds = (image.flatten(2).flatten(0, 1) for image in (values, kinds))
    cell = (height + gap) / DPI, (width + gap) / DPI
    if show == "pattern":
        known = (
            "largest recorded weight of each cell" if any(max(r.queries, r.keys) > _TILE_CELLS for r in records) else ""
        )
        return _grid(records, values, kinds, cell, title="Rows: queries, columns: keys", known=known)
    notes = (
        [f"keys are binned to at most {_TILE_BARS} bars"] if any(record.keys > _TILE_BARS for record in records) else []
    )
    notes += [] if exact else ["sum of recorded weights: a lower bound"]
    return _grid(records, values, kinds, cell, title="Attention received", name="share of all", known=", ".join(notes))


def _table(records: Sequence[RecordLike], batch: int, show: str, count: int, side: float) -> Figure:
    """Draw one number per head."""
    from matplotlib.colors import Normalize

    values = torch.full((len(records), count), math.nan)
    kinds = torch.full(values.shape, GAP)
    for n, record in enumerate(records):
        entries, numbers = rows(record, batch), torch.full((record.heads,), math.nan)
        total = entries.weights.sum(-1)
        if show == "entropy" and entries.entropy is not None:
            numbers = (entries.entropy * (total > 0)).sum(-1) / (total > 0).sum(-1)
        elif show == "distance" and record.kind != "cross":
            distance = (entries.keys - entries.offset - torch.arange(record.queries)[:, None]).abs()
            numbers = (entries.weights * distance).sum((-1, -2)) / total.sum(-1)
        values[n, : record.heads] = numbers
        kinds[n, : record.heads] = torch.where(numbers.isnan(), UNKNOWN, KNOWN)
    if not bool((kinds == KNOWN).any()):
        expected = "records of regard.watch(..., entropy=True)" if show == "entropy" else "records of self-attention"
        raise ValueError(f"show is {show!r}, which no record has; expected {expected}, or another show")
    largest = float(values[kinds == KNOWN].max())
    how = {"title": "Mean distance", "name": "tokens, of recorded weights", "unknown": "undefined for cross attention"}
    if show == "entropy":
        largest = math.log(max(record.keys for record in records))
        how = {"title": "Mean entropy", "name": "entropy in nats", "unknown": "not recorded"}
    norm = Normalize(0, largest or 1)
    figure = _grid(records, values, kinds, (side, side), norm=norm, ticks=None, **how)
    for n, head in (kinds == KNOWN).nonzero().tolist() if side >= 0.3 else ():
        number = float(values[n, head])
        ink = "white" if norm(number) > 0.55 else "black"
        text = f"{number:.{1 if number < 9.95 else 0}f}"
        figure.axes[0].text(head, n, text, ha="center", va="center", color=ink, fontsize=min(8, 20 * side))
    return figure


def _grid(records: Sequence[RecordLike], values: Tensor, kinds: Tensor, inches: Sequence[float], **how: Any) -> Figure:
    """Draw a figure with one row per record and one column per head, of `inches` (height, width) each."""
    count = max(record.heads for record in records)
    size = inches[0] * len(records), inches[1] * count
    ax = paint(None, values, kinds, (-0.5, count - 0.5, len(records) - 0.5, -0.5), size, across="head", **how)
    ax.set_yticks(range(len(records)), [label(record, Sides(0, 0, (), ())) for record in records])
    ax.set_xticks(range(count))
    for axis, lines in ((ax.xaxis, count), (ax.yaxis, len(records))):
        axis.set_ticks([n - 0.5 for n in range(1, lines)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return fit_axes(ax, size)
