"""Content of `regard demo`: the three stages of attention on one sentence, and a small model that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from regard.attention import attention
from regard.components import normalizer
from regard.components.summary import Summary
from regard.tasks.fit import Start
from regard.tasks.pronounce import pronunciations
from regard.tasks.split import split
from regard.tasks.train import Epoch, Step, Training, train
from regard.tasks.translate import Translate, TranslateSettings

SENTENCE = "The animal didn't cross the street because it was too tired."
_WORDS = ("the", "cat", "sat", "because", "it", "purred")
# Two hand-made features per word: "is a thing" and "does something". The query of "it" matches a thing.
_FEATURES = torch.tensor([[0.1, 0.0], [2.0, 0.3], [0.1, 1.6], [0.0, 0.2], [1.4, 0.2], [0.2, 1.9]])


def stages() -> Iterator[RenderableType]:
    """Yield rich renderables that explain the three stages of attention.

    >>> import io
    >>> from rich.console import Console
    >>> console = Console(file=io.StringIO(), width=100)
    >>> for part in stages():
    ...     console.print(part)
    >>> "Row 'it' has an entropy of 1.48 nats" in console.file.getvalue()
    True
    """
    q = k = v = _FEATURES
    D = q.shape[-1]
    scores = q @ k.T / D**0.5
    weights = torch.softmax(scores, -1)
    out, summary = attention(q, k, v, summary=Summary(full=True, entropy=True))
    assert summary.full is not None and summary.entropy is not None

    yield Text.assemble(
        "\nSix words, each a vector of two features: ", ("is a thing", "bold"), ", ",
        ("does something", "bold"),
        ".\nHere each word is its own query, key and value.\n",
    )  # fmt: skip
    yield _stage(1, "score", "s = q . k / sqrt(2)", "How well the query of a row matches the key of a column.")
    yield _word_matrix(scores)
    yield _stage(2, "normalize", "p = softmax(s)", "Each row sums to 1. 'it' attends to 'cat'.")
    yield _word_matrix(weights)
    yield _stage(3, "aggregate", "o = sum of p v", "Each output is the weighted sum of the values.")
    yield Columns([_vectors("values", v), _vectors("outputs", out)], padding=(0, 4))
    entropy, maximum = float(summary.entropy[4]), math.log(len(_WORDS))
    yield Text.assemble(
        "\nOne call computes all three stages, and statistics of the weights:\n\n",
        ("    out, summary = regard.attention(q, k, v, summary=regard.Summary(entropy=True))\n\n", "bold"),
        f"It agrees with the steps above to {float((summary.full - weights).abs().max()):.0e}. ",
        f"Row 'it' has an entropy of {entropy:.2f} nats; uniform weights would have {maximum:.2f}.\n",
    )  # fmt: skip
    yield Text("The normalizer is one argument. With normalizer=normalizer.Sparsemax(), most weights are exactly 0:\n")
    _, sparse = attention(q, k, v, normalizer=normalizer.Sparsemax(), summary=Summary(full=True))
    assert sparse.full is not None
    yield _word_matrix(sparse.full)


# Words with silent and double letters and digraphs, none of them in the training data.
SPOKEN = ("knight", "cheese", "attention")
_EXAMPLES = 40_000  # words; six epochs take about a minute on two cores
_LIMIT = 60.0  # seconds after which no epoch starts, for slower machines


def pronounce(folder: Path, on_progress: Callable[[Start | Step | Epoch], None]) -> Translate:
    """Train a small recurrent model from letters to sounds for about a minute, and save it in the folder."""
    words = [pair for pair in pronunciations() if pair.source.isalpha() and pair.source not in SPOKEN]
    examples, dev = split(words, [0.005])
    settings = TranslateSettings(model="recurrent", units="symbols", width=64, hidden=128, layers=1, dropout=0.1)
    training = Training(epochs=6, batch=2048, rate=4e-3, warmup=50, average=0.98)
    task, _ = train(Translate, settings, training, examples[:_EXAMPLES], dev, folder, tell=on_progress, limit=_LIMIT)
    assert isinstance(task, Translate)
    return task


def _stage(number: int, name: str, formula: str, meaning: str) -> RenderableType:
    return Text.assemble(
        (f"\n Stage {number} ", "bold reverse"), (f"  {name}   ", "bold"), (formula, "cyan"), f"\n {meaning}\n"
    )


def _word_matrix(x: Tensor) -> RenderableType:
    """A table of a matrix (words, words), shaded by its values."""
    table = Table(box=None, padding=(0, 0), show_header=True)
    table.add_column("")
    for word in _WORDS:
        table.add_column(Text(word, style="dim"), justify="right", min_width=9)
    low, high = float(x.min()), float(x.max())
    for word, row in zip(_WORDS, x.tolist(), strict=True):
        table.add_row(Text(f"{word} ", style="dim"), *[_cell(number, low, high) for number in row])
    return Padding(table, (0, 2))


def _cell(number: float, low: float, high: float) -> Text:
    share = (number - low) / (high - low)
    # From near black to blue, with dark text on light cells.
    red, green, blue = (round(a + (b - a) * share) for a, b in ((24, 120), (26, 190), (34, 255)))
    style = f"{'black' if share > 0.6 else 'white'} on rgb({red},{green},{blue})"
    return Text(f"{number:7.2f}  " if number else "      ·  ", style=style)


def _vectors(title: str, x: Tensor) -> RenderableType:
    rows: Sequence[Text] = [
        Text.assemble((f"  {word:<8}", "dim"), "  ".join(f"{number:5.2f}" for number in row))
        for word, row in zip(_WORDS, x.tolist(), strict=True)
    ]
    return Group(Text(f"  {title}", style="bold"), *rows)
