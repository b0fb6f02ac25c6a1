"""Training settings that follow the number of steps that the data give."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

# Below these numbers, small data learn nothing: the warm-up is not over, and the average is that of the initial weights.
_STEPS_PER_EPOCH, _STEPS, _MAX_EPOCHS, _MIN_BATCH = 12, 600, 100, 64


@dataclass(frozen=True)
class Start:
    """The settings with which training starts, and the number of steps of the first epoch."""

    training: Any
    steps: int


def fit_to_data(training: Any, sizes: Sequence[int], fixed: Collection[str] = ()) -> Any:
    """Return settings in which batch, epochs, warm-up, average and patience follow the number of steps.

    Large data change nothing. For small ones there are at least 12 steps per epoch and 600 in all, as far as batches of
    64 tokens and 100 epochs give them; the warm-up takes at most a quarter of the steps, and the average reaches back
    over at most a third.

    Args:
        training: a `Training` with the settings for large data.
        sizes: the number of tokens of each example.
        fixed: the names of settings that stay.

    >>> from regard.tasks.train import Training
    >>> small = fit_to_data(Training(epochs=15, batch=1024), [7] * 300)
    >>> small.batch, small.epochs, small.warmup, round(small.average, 3), small.patience
    (175, 50, 150, 0.995, 12)
    >>> fit_to_data(Training(), [20] * 100_000) == Training()
    True
    """
    tokens = sum(sizes)
    changes: dict[str, Any] = {"batch": min(training.batch, max(_MIN_BATCH, tokens // _STEPS_PER_EPOCH, max(sizes)))}
    batch = training.batch if "batch" in fixed else changes["batch"]
    per_epoch = max(ceil(tokens / batch), 1)
    changes["epochs"] = max(training.epochs, min(ceil(_STEPS / per_epoch), _MAX_EPOCHS))
    epochs = training.epochs if "epochs" in fixed else changes["epochs"]
    steps = per_epoch * epochs
    changes["warmup"] = min(training.warmup, steps // 4)
    changes["average"] = min(training.average, 1 - 3 / max(steps, 6))
    changes["patience"] = max(training.patience, epochs // 4 if epochs > training.epochs else 0)
    return replace(training, **{name: value for name, value in changes.items() if name not in fixed})
