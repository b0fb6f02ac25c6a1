"""Where a prediction looked, for the terminal: the source tokens of each target token, and a text shaded by its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from regard.view.terminal import shade
from regard.view.token import read

if TYPE_CHECKING:
    from rich.text import Text

_SHOWN, _LEAST = 3, 0.05  # source tokens a line, if they have so much of the weight


def alignment(source: Sequence[str], target: Sequence[str], weights: Tensor) -> Text:
    """A line for each target token: the source tokens it looked at most, shaded by their weights (target, source)."""
    from rich.text import Text

    sources, targets = ([reading.text for reading in read(tokens)] for tokens in (source, target))
    widest = max((len(token) for token in targets), default=0)
    shown = Text()
    for token, row in zip(targets, weights.tolist(), strict=False):
        shown.append(f"  {token:<{widest}} ", "bold")
        shown.append("←", "dim")
        for index in sorted(range(len(row)), key=lambda j: -row[j])[:_SHOWN]:
            if row[index] >= _LEAST:
                shown.append(" ")
                shown.append(f" {sources[index]} ", shade(row[index]))
                shown.append(f" {row[index]:.2f}", "dim")
        shown.append("\n")
    return shown


def shaded(words: Sequence[str], weights: Tensor) -> Text:
    """A text whose words are shaded by their weights (words,); the largest is the brightest."""
    from rich.text import Text

    largest = float(weights.max()) if len(words) else 0.0
    shown = Text()
    for word, weight in zip(words, weights.tolist(), strict=True):
        shown.append(f" {word} ", shade(weight / largest if largest else 0.0))
    return shown
