"""Figures show the recorded weights, mark unrecorded and masked ones, and draw tokens as plain text."""

from __future__ import annotations

import math
import re
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from support.paths import ROOT
from support.records import make_record, random_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Top
from regard.view import plot
from regard.view.figure import alignment, heads, heatmap
from regard.watch import Record
from regard.watch.analysis.heads import heads as statistics

HOSTILE = ["$x_1$", "</script>", "\\alpha", "\u6f22\u5b57", "\ud800", "a_b^c$", "{}%", "\x00"]
GRAY, WHITE = ([round(255 * part) for part in to_rgb(color)] for color in (plot.GRAY, plot.WHITE))


def drawn(figure: Figure) -> np.ma.MaskedArray:
    """Return the weights that a figure draws."""
    image = figure.axes[0].images[-1]
    assert image.norm.vmin == 0
    found: np.ma.MaskedArray = np.ma.masked_array(image.get_array())
    return found


def ground(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """Return the median color of the background of each cell."""
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    cells = pixels.reshape(rows, high, columns, wide, 4).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1, 4)
    return np.median(cells, axis=2).astype(int)


def legend(figure: Figure) -> list[str]:
    found = figure.axes[0].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def labels(figure: Figure, axis: str) -> list[str]:
    return [text.get_text() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


# One head


def test_heatmap_draws_queries_as_rows_and_keys_as_columns() -> None:
    weights = random_weights(2, 3, 5, 7)
    figure = heatmap(make_record(weights, kind="cross"), list("abcde"), head=2, batch=1, key_tokens=list("tuvwxyz"))
    np.testing.assert_allclose(drawn(figure), weights[1, 2])
    assert labels(figure, "y") == list("abcde")
    assert labels(figure, "x") == list("tuvwxyz")
    low, high = figure.axes[0].get_ylim()
    assert low > high, "the first query is at the top"
    assert not legend(figure), "all weights are recorded"
    assert figure.axes[0].images[-1].norm(0.25) == pytest.approx(0.5), "square root scale"


def test_heatmap_hatches_unrecorded_weights() -> None:
    weights = random_weights(1, 2, 9, 9)
    record = make_record(weights, k=3)
    figure = heatmap(record, head=1)
    found, listed = drawn(figure), np.zeros((9, 9), bool)
    np.put_along_axis(listed, record.top.keys[0, 1].numpy(), True, -1)
    assert (found.mask == ~listed).all()
    np.testing.assert_allclose(found[listed], weights[0, 1].numpy()[listed])
    under = ground(figure, 9, 9)
    assert (under[~listed] == [*GRAY, 255]).all()
    assert (under[listed][:, 3] == 0).all()
    assert len(np.unique(figure.axes[0].images[0].get_array().reshape(-1, 4), axis=0)) > 2, "strokes on gray"
    [line] = legend(figure)
    bound = float(re.fullmatch(r"not recorded: at most ([\d.]+) each", line)[1])  # type: ignore[index]
    assert weights[0, 1].numpy()[~listed].max() <= bound < weights[0, 1].max()


def test_heatmap_leaves_masked_weights_blank() -> None:
    weights = random_weights(1, 2, 8, 8, causal=True)
    later = np.triu(np.ones((8, 8), bool), 1)
    figure = heatmap(make_record(weights, causal=True), head=0)
    assert (drawn(figure).mask == later).all()
    assert (ground(figure, 8, 8)[later] == [*WHITE, 255]).all()
    assert legend(figure) == ["masked"]
    figure = heatmap(make_record(weights, k=3, causal=True), head=0)
    assert (ground(figure, 8, 8)[later] == [*WHITE, 255]).all()
    assert (ground(figure, 8, 8)[~later & drawn(figure).mask] == [*GRAY, 255]).all()


def test_heatmap_aligns_queries_of_a_cached_step_with_last_keys() -> None:
    figure = heatmap(make_record(random_weights(1, 1, 2, 5, causal=True), causal=True), list("abcde"), head=0)
    assert labels(figure, "y") == ["d", "e"]
    assert drawn(figure).mask.tolist() == [[False] * 4 + [True], [False] * 5]


def test_heatmap_max_pools_long_texts() -> None:
    weights = random_weights(1, 1, 1100, 700, sharp=4)
    figure = heatmap(make_record(weights, kind="cross"), head=0)
    pooled = torch.nn.functional.max_pool2d(weights[0], 3, ceil_mode=True)[0]
    np.testing.assert_array_equal(drawn(figure), pooled)
    assert legend(figure) == ["largest recorded weight of 3 × 3"]
    high, wide = (side / 3 for side in (1100, 700))
    figure.draw_without_rendering()
    inches = figure.axes[0].get_position().size * figure.get_size_inches()
    assert inches[1] / inches[0] == pytest.approx(high / wide, rel=0.01), "cells are square"


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operator returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


def long(size: int, k: int) -> Record:
    """Return a causal record of a long text, in which each row lists distinct keys."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, size // k, (1, 1, size, k), generator=generator).cumsum(-1) - 1
    keys = torch.arange(size)[:, None] - steps
    weights = torch.rand(1, 1, size, k, generator=generator).sort(-1, descending=True).values / (2 * k)
    listed = keys >= 0
    top = Top(weights * listed, keys.masked_fill(~listed, -1))
    return Record("a", 0, 0, "decoder", 1, size, size, top, top.weights[..., 0], None, None, None)


def test_heatmap_of_4096_tokens_is_fast_and_allocates_no_dense_matrix() -> None:
    size = 4096
    record = long(size, 8)
    with Largest() as largest:
        heatmap(record, head=0)
    tracemalloc.start()  # for NumPy arrays
    figure = heatmap(record, ["word"] * size, head=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(peak, largest.size) < 4 * size * size / 3
    start = time.perf_counter()
    heatmap(record, ["word"] * size, head=0).savefig(BytesIO())
    assert time.perf_counter() - start < 8
    found = drawn(figure)
    assert found.shape == (512, 512)
    rows, keys = torch.arange(size)[:, None].expand(-1, 8) // 8, record.top.keys[0, 0]
    expected = np.full((512, 512), -1.0, np.float32)
    known = keys >= 0
    np.maximum.at(expected, (rows[known], keys[known] // 8), record.top.weights[0, 0][known])
    np.testing.assert_array_equal(found.filled(-1), expected)
    assert all(label.isdigit() for label in labels(figure, "x"))


@pytest.mark.filterwarnings("ignore:Glyph .* missing from")
def test_heatmap_draws_tokens_as_plain_text(tmp_path: Path) -> None:
    figure = heatmap(make_record(random_weights(1, 1, 8, 8)), HOSTILE, head=0)
    for text in figure.axes[0].get_yticklabels()[:3]:
        assert text.get_text() in HOSTILE
        assert not text.get_parse_math()
    figure.savefig(tmp_path / "head.png")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "head.svg")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    document = (tmp_path / "head.svg").read_text(encoding="utf-8")
    assert document.count(">$x_1$<") == 2
    assert "&lt;/script&gt;" in document
    assert "</script>" not in document


def test_heatmap_draws_in_given_axes_only() -> None:
    figure = Figure(figsize=(8, 4))
    part = figure.subfigures(1, 2)[1]
    ax = part.subplots(1, 2)[0]
    weights = random_weights(1, 1, 300, 300)
    assert heatmap(make_record(weights), head=0, ax=ax) is figure
    cells = np.asarray(ax.images[-1].get_array()).shape[0]
    assert cells <= ax.get_window_extent().height, "each cell has at least one pixel"
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


# All heads


def tile(array: np.ndarray, row: int, column: int, rows: int, columns: int) -> np.ma.MaskedArray:
    """Return the values of a tile, without the gaps around it."""
    high, wide = array.shape[0] // rows, array.shape[1] // columns
    part = array[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
    middle = np.ma.masked_array(part)
    inside = ~middle.mask if middle.mask.shape else np.ones(part.shape, bool)
    return middle[inside.any(1)][:, inside.any(0)]


def test_heads_pattern_draws_one_tile_per_head() -> None:
    weights = [random_weights(1, 3, 6, 6, seed=n) for n in range(2)]
    figure = heads([make_record(w, n) for n, w in enumerate(weights)])
    assert labels(figure, "y") == ["layer 0", "layer 1"]
    assert labels(figure, "x") == ["0", "1", "2"]
    found = drawn(figure)
    for layer in range(2):
        for head in range(3):
            part = tile(found, layer, head, 2, 3)
            step = part.shape[0] // 6
            np.testing.assert_allclose(part[step // 2 :: step, step // 2 :: step], weights[layer][0, head])
    assert legend(heads([make_record(random_weights(1, 3, 6, 6, causal=True), k=2, causal=True)])) == [
        "not recorded",
        "masked",
    ]


def test_heads_pattern_max_pools_long_texts() -> None:
    weights = random_weights(1, 1, 100, 30, sharp=4)
    figure = heads([make_record(weights, kind="cross")])
    part = tile(drawn(figure), 0, 0, 1, 1)
    down, across = part.shape[0] // 34, part.shape[1] // 30
    pooled = torch.nn.functional.max_pool2d(weights[0], (3, 1), ceil_mode=True)[0]
    np.testing.assert_array_equal(part[down // 2 :: down, across // 2 :: across], pooled)
    assert legend(figure) == ["largest recorded weight of each cell"]


def test_heads_received_draws_shares_of_attention() -> None:
    weights = random_weights(1, 2, 10, 50)
    record = make_record(weights, kind="cross", k=5)
    figure = heads([record], show="received")
    assert legend(figure) == ["keys are binned to at most 32 bars"]
    shares = weights[0].sum(1).view(2, 25, 2).sum(-1) / 10
    for head in range(2):
        part = tile(drawn(figure), 0, head, 1, 2)
        bars = part[:, part.shape[1] // 50 :: part.shape[1] // 25]
        np.testing.assert_allclose(bars[-1], shares[head], rtol=1e-5)
        heights = (bars > 0).sum(0) / len(bars)
        np.testing.assert_allclose(heights, shares[head].sqrt(), atol=1 / 40 + 1e-6)
    assert "lower bound" in legend(heads([replace(record, received=None)], show="received"))[0]


def test_heads_entropy_and_distance_match_statistics() -> None:
    records = [
        make_record(random_weights(1, 4, 9, 12, seed=1, causal=True), 0, k=4, causal=True),
        make_record(random_weights(1, 2, 12, 5, seed=2), 1, kind="cross"),
    ]
    for show in ("entropy", "distance"):
        figure = heads(records, show=show)
        found = drawn(figure)
        np.testing.assert_allclose(found[0], getattr(statistics(records[0]), show)[0], rtol=1e-5)
        assert found.mask[1, 2:].all(), "the second record has two heads only"
        written = [text.get_text() for text in figure.axes[0].texts[:4]]
        assert written == [f"{number:.1f}" for number in found[0]]
    assert legend(figure) == ["undefined for cross attention"]
    assert found.mask[1].all()


# Alignments


def test_alignment_draws_targets_as_rows_and_sources_as_columns() -> None:
    weights = random_weights(1, 4, 3, 6)
    record = make_record(weights, kind="cross")
    target, source = ["le", "chat", "dort"], ["now", "the", "cat", "is", "fast", "asleep"]
    for figure, expected in (
        (alignment(record, target, source), weights[0].mean(0)),
        (alignment(record, target, source, head=2), weights[0, 2]),
        (alignment(weights[0, 1], target, source), weights[0, 1]),
    ):
        np.testing.assert_allclose(drawn(figure), expected, rtol=1e-6)
        assert (labels(figure, "y"), labels(figure, "x")) == (target, source)
        assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("target", "source")
        assert figure.axes[0].xaxis.get_ticks_position() == "top"


def test_alignment_mean_of_recorded_weights_is_a_lower_bound() -> None:
    weights = random_weights(1, 4, 5, 9, seed=3)
    record = make_record(weights, kind="cross", k=3)
    figure = alignment(record, list("abcde"), list("123456789"))
    dense = torch.zeros_like(weights).scatter_(-1, record.top.keys, record.top.weights)[0].mean(0)
    np.testing.assert_allclose(drawn(figure).filled(0), dense, rtol=1e-6)
    assert (drawn(figure).mask == (dense == 0).numpy()).all()
    least, unknown = legend(figure)
    assert "lower bound" in least
    bound = float(unknown.removesuffix(" each").rpartition(" ")[2])
    assert weights[0].mean(0).numpy()[drawn(figure).mask].max() <= bound


# Errors


RECORD = make_record(random_weights(2, 3, 4, 4))
CROSS = make_record(random_weights(1, 3, 4, 6), kind="cross")


@pytest.mark.parametrize(
    ("draw", "kind", "message"),
    [
        (lambda: heatmap([RECORD], head=0), TypeError, "record is .* expected one record of regard.watch"),
        (lambda: heatmap(RECORD, head=3), ValueError, "head is 3; expected an integer from 0 to 2"),
        (lambda: heatmap(RECORD, head="1"), TypeError, "head is '1'; expected an integer"),
        (lambda: heatmap(RECORD, head=0, batch=2), ValueError, "batch is 2: expected 0 <= batch < 2"),
        (lambda: heatmap(RECORD, head=0, batch=None), TypeError, "batch is None; expected an integer"),
        (lambda: heatmap(RECORD, "abcd", head=0), TypeError, "tokens is 'abcd'; expected a sequence of strings"),
        (lambda: heatmap(RECORD, [1, 2, 3, 4], head=0), TypeError, "tokens is .* expected a sequence of strings"),
        (lambda: heatmap(RECORD, ["a"], head=0), ValueError, "tokens has 1 entries: expected 4"),
        (lambda: heatmap(CROSS, list("abcd"), head=0), ValueError, "tokens has 4 entries: expected 6"),
        (lambda: heatmap(RECORD, head=0, ax=3), TypeError, "ax is 3; expected axes of matplotlib"),
        (lambda: heads(RECORD), TypeError, "records is .* expected one or more records"),
        (lambda: heads([]), ValueError, r"records is \[\]; expected one or more records"),
        (lambda: heads([RECORD, 3]), TypeError, r"records\[1\] is 3; expected one record"),
        (lambda: heads([RECORD], show="all"), ValueError, "show is 'all'; expected 'pattern', 'received'"),
        (lambda: heads([CROSS], show="distance"), ValueError, "show is 'distance', which no record has"),
        (lambda: heads([replace(make_record(random_weights(1, 1, 5, 5), k=2), entropy=None)], show="entropy"), ValueError, "entropy=True"),
        (lambda: alignment(CROSS, list("abcd"), ["x"]), ValueError, r"\(4, 1\) entries: expected \(4, 6\)"),
        (lambda: alignment(CROSS, list("abcd"), list("123456"), head=5), ValueError, "head is 5; expected"),
        (lambda: alignment(torch.ones(2, 3), ["a"], ["b"]), ValueError, r"shape \(2, 3\); expected \(L, S\) = \(1, 1\)"),
        (lambda: alignment(torch.tensor([[-1.0]]), ["a"], ["b"]), ValueError, "from -1 to -1; expected 0 to 1"),
        (lambda: alignment(torch.tensor([[math.nan]]), ["a"], ["b"]), ValueError, "from nan to nan"),
        (lambda: alignment(torch.ones(1, 1), ["a"], ["b"], head=1), ValueError, "head is 1 and batch is 0; expected None"),
        (lambda: alignment("weights", ["a"], ["b"]), TypeError, "record_or_weights is 'weights'; expected one record"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(draw: Callable[[], Figure], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        draw()


def test_missing_matplotlib_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: heatmap(RECORD, head=0),
        lambda: heads([RECORD]),
        lambda: alignment(torch.ones(1, 1), ["a"], ["b"]),
    ):
        with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'regard\[watch\]'"):
            draw()


def test_colors_match_the_page() -> None:
    script = (ROOT / "frontend" / "color.js").read_text()
    found = re.search(r"light: \[(\[.*?\])\],", script)
    assert found
    stops = [[float(x) for x in stop.split(",")] for stop in re.findall(r"\[(.*?)\]", found[1])]
    assert len(stops) == len(plot.RAMP)
    for (light, chroma, hue), color in zip(stops, plot.RAMP, strict=True):
        # sRGB to OKLab, with the coefficients of Björn Ottosson
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]
        lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                        [0.0883024619, 0.2817188376, 0.6299787005]]) @ linear  # fmt: skip
        lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                        [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(lms)  # fmt: skip
        angle = math.radians(hue)
        np.testing.assert_allclose(lab, [light, chroma * math.cos(angle), chroma * math.sin(angle)], atol=0.004)
