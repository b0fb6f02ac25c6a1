"""Alignments in the terminal: the source tokens of each target token, and a text shaded by its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from regard.view.terminal import shade
from regard.view.token import read

if TYPE_CHECKING:
    from rich.text import Text

_MAX_SOURCES, _MIN_WEIGHT = 3, 0.05  # source tokens per line, and the least weight of one


def alignment(source: Sequence[str], target: Sequence[str], weights: Tensor) -> Text:
    """Return one line per target token: the source tokens of its largest weights, each shaded by its weight.

    Args:
        source, target: the S source tokens and the L target tokens.
        weights: the attention weights (L, S).

    >>> print(alignment(["two", "men"], ["zwei"], torch.tensor([[0.9, 0.1]])).plain, end="")
      zwei ←  two  0.90  men  0.10
    """
    from rich.text import Text

    sources, targets = ([reading.text for reading in read(tokens)] for tokens in (source, target))
    width = max((len(token) for token in targets), default=0)
    text = Text()
    for token, row in zip(targets, weights.tolist(), strict=False):
        text.append(f"  {token:<{width}} ", "bold")
        text.append("←", "dim")
        for index in sorted(range(len(row)), key=lambda j: -row[j])[:_MAX_SOURCES]:
            if row[index] >= _MIN_WEIGHT:
                text.append(" ")
                text.append(f" {sources[index]} ", shade(row[index]))
                text.append(f" {row[index]:.2f}", "dim")
        text.append("\n")
    return text


def shaded(words: Sequence[str], weights: Tensor) -> Text:
    """Return a text whose words are shaded by their weights (words,), relative to the largest weight.

    >>> [span.style for span in shaded(["a", "film"], torch.tensor([0.0, 0.6])).spans]
    ['#10141f on #d9ecd4']
    """
    from rich.text import Text

    largest = float(weights.max()) if len(words) else 0.0
    text = Text()
    for word, weight in zip(words, weights.tolist(), strict=True):
        text.append(f" {word} ", shade(weight / largest if largest else 0.0))
    return text
