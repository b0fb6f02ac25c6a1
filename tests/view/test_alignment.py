"""Alignments in the terminal."""

from __future__ import annotations

import torch

from regard.view.alignment import alignment, shaded


def test_alignment_shows_largest_sources_shaded_by_weight() -> None:
    weights = torch.tensor([[0.9, 0.06, 0.04], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    shown = alignment(["▁two", "▁men", "</s>"], ["▁zwei", "▁Männer"], weights)
    assert shown.plain == "  zwei   ←  two  0.90  men  0.06\n  Männer ←  </s>  0.50  men  0.30  two  0.20\n"
    strongest, weaker = (span for span in shown.spans if shown.plain[span.start : span.end] == " two ")
    assert "on #" in str(strongest.style)
    assert strongest.style != weaker.style
    assert alignment([], [], torch.empty(0, 0)).plain == ""


def test_alignment_does_not_parse_markup_in_tokens() -> None:
    assert "[bold]" in alignment(["[bold]"], ["x"], torch.ones(1, 1)).plain
    assert "[bold]" in shaded(["[bold]"], torch.ones(1)).plain


def test_shaded_scales_by_largest_weight() -> None:
    shown = shaded(["a", "good", "film"], torch.tensor([0.0, 0.6, 0.3]))
    assert shown.plain == " a  good  film "
    styles = {shown.plain[span.start : span.end].strip(): str(span.style) for span in shown.spans}
    assert "a" not in styles or not styles["a"]
    assert styles["good"] != styles["film"]
    assert shaded([], torch.empty(0)).plain == ""
