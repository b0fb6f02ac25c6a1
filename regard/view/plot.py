"""The matplotlib parts of figures: colors, textures, labels, sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.view.token import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAMP = ("#eef4fb", "#9fcdf5", "#5aa0e6", "#3168c4", "#23398b", "#161850")  # as in frontend/color.js
GAP, KNOWN, UNKNOWN, MASKED = range(4)
CLEAR, WHITE, GRAY, STROKE = "#ffffff00", "#ffffff", "#f3f4f6", "#b9bfcb"
DPI = 150
MAX_CELLS = 512  # cells per side of a matrix
_MIN_SPACING = 0.125  # inches per token label
_MAX_LETTERS = 16  # per token label
# Fallback fonts, used if they are installed.
_FALLBACK_FONTS = ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei", "Noto Sans")


def paint(
    ax: Any, values: Tensor, kinds: Tensor, box: tuple[float, ...], inches: tuple[float, ...], *, title: str, across: str,
    name: str = "weight", norm: Any = None, ticks: Sequence[float] | None = (0, 0.05, 0.25, 0.5, 1), known: str = "",
    unknown: str = "not recorded",
) -> Any:  # fmt: skip
    """Draw values (h, w) as colors, textures for other kinds, a color bar and a legend, in given axes or a new figure."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ax = Figure(dpi=DPI, layout="constrained").add_subplot() if ax is None else ax
    if bool((kinds > KNOWN).any()):
        pixels = [max(1, round(side * DPI / n)) for side, n in zip(inches, kinds.shape, strict=True)]
        fine = kinds.repeat_interleave(pixels[0], 0).repeat_interleave(pixels[1], 1)
        y, x = torch.arange(fine.shape[0])[:, None], torch.arange(fine.shape[1])
        stroke = torch.where(fine == UNKNOWN, (x + y) % 12 < 1, (x % 10 < 2) & (y % 10 < 2)).long()
        paints = 255 * to_rgba_array([CLEAR] * 4 + [GRAY, STROKE, WHITE, STROKE])  # background and stroke of each kind
        ax.imshow(paints.astype("uint8")[(2 * fine + stroke).numpy()], extent=box, aspect="auto")
    ramp = LinearSegmentedColormap.from_list("regard", RAMP).with_extremes(bad=CLEAR)
    norm = norm or PowerNorm(0.5, 0, 1)
    shown = ax.imshow(values.numpy(), cmap=ramp, norm=norm, extent=box, interpolation="nearest", aspect="auto")
    color_axes, is_low = ax.inset_axes((1 + 0.12 / inches[1], 0, 0.1 / inches[1], 1)), inches[0] < 0.8
    scale = ax.figure.colorbar(
        shown, cax=color_axes, ticks=(norm.vmin, norm.vmax) if is_low else ticks, format="{x:.3g}"
    )
    scale.set_label("" if is_low else name, fontsize=8)
    scale.outline.set_visible(False)
    color_axes.tick_params(labelsize=8, length=2)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(across, fontsize=9)
    ax.xaxis.set(ticks_position="top", label_position="top")
    marks = [(RAMP[3], "", known)] if known else []
    marks += [(GRAY, "////", unknown)] if bool((kinds == UNKNOWN).any()) else []
    marks += [(WHITE, "....", "masked")] if bool((kinds == MASKED).any()) else []
    if marks:
        ax.legend(
            handles=[Patch(fc=ground, ec=STROKE, hatch=hatch, lw=0, label=text) for ground, hatch, text in marks],
            loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.7, borderpad=0, frameon=False, fontsize=8,
            ncols=1 if inches[1] < 4 else len(marks), handlelength=1.4, columnspacing=1.5,
        )  # fmt: skip
    return ax


def label_ticks(axis: Any, tokens: Sequence[str], offset: int, inches: float) -> None:
    """Label rows or columns with tokens if they fit, else with some of their indices."""
    from matplotlib import font_manager, rcParams

    spacing = inches / len(tokens)
    if spacing < _MIN_SPACING:
        most = max(2, min(8, int(2 * inches)))
        step = next(s for e in range(9) for s in (10**e, 2 * 10**e, 5 * 10**e) if len(tokens) <= s * most)
        positions = range(-(-offset // step) * step, offset + len(tokens), step)
        axis.set_ticks(
            [position - offset for position in positions], [str(position) for position in positions], fontsize=8
        )
        return
    texts = [reading.text.encode("utf-8", "replace").decode("utf-8") for reading in read(tokens)]
    texts = [text if len(text) <= _MAX_LETTERS else text[: _MAX_LETTERS - 1] + "…" for text in texts]
    installed = set(font_manager.get_font_names()).intersection(_FALLBACK_FONTS)
    fonts = [
        *rcParams["font.family"],
        *sorted(installed, key=_FALLBACK_FONTS.index),
    ]  # each character uses the first font that has it
    rotation = 90 if axis.axis_name == "x" and any(len(text) > 2 for text in texts) else 0
    axis.set_ticks(range(len(texts)), texts, fontsize=min(9, 46 * spacing), fontfamily=fonts, rotation=rotation)
    for text in axis.get_ticklabels():
        text.set(parse_math=False, usetex=False)  # tokens are not formulas
    axis.set_ticks([n + 0.5 for n in range(len(texts) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5)
    axis.set_tick_params(which="both", length=0)


def matrix_size(sizes: tuple[int, int]) -> tuple[float, ...]:
    """Return the (height, width) of a matrix in inches: an integer number of pixels per cell, and room for few tokens.

    >>> [round(side * DPI) for side in matrix_size((100, 200))]
    [400, 800]
    """
    step = -(-max(sizes) // MAX_CELLS)
    cells = -(-max(sizes) // step)
    pixels = min(max(round(5.8 * DPI / cells), 21 if cells <= 64 else 1), max(51, 240 // cells))
    return tuple(max(least, -(-size // step) * pixels / DPI) for least, size in zip((0.8, 1.2), sizes, strict=True))


def fit_axes(ax: Any, inches: tuple[float, ...]) -> Figure:
    """Resize the figure so that its axes have the given (height, width) in inches, and return it."""
    figure: Figure = ax.figure
    layout: Any = figure.get_layout_engine()
    figure.set_size_inches(inches[1] + 4, inches[0] + 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing glyphs are reported when the figure is drawn
        for _ in range(2):
            layout.execute(figure)
            width, height = figure.get_size_inches() * (1 - ax.get_position().size)  # of the labels around the axes
            figure.set_size_inches(inches[1] + width, inches[0] + height)
    return figure
