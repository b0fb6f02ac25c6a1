"""The tasks of `regard train`, and their default settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.tasks import classify, tag, translate
from regard.tasks.data import read_labeled, read_pairs, read_tagged
from regard.tasks.pronounce import pronunciations
from regard.tasks.task import Task
from regard.tasks.train import Training


@dataclass(frozen=True)
class Preset:
    """A task with default settings.

    Args:
        task: the task class.
        read: reads examples from files.
        settings, training: the defaults per model; the first model is the default.
        built_in: returns the examples of an installed package, which are used if no files are given.
    """

    task: type[Task]
    read: Callable[[Sequence[Path]], Sequence[Any]]
    settings: dict[str, Any]
    training: dict[str, Training]
    built_in: Callable[[], Sequence[Any]] | None = None


PRESETS: dict[str, Preset] = {
    "translate": Preset(
        translate.Translate,
        read_pairs,
        {
            "transformer": translate.TranslateSettings(),
            "recurrent": translate.TranslateSettings(model="recurrent", layers=1, dropout=0.3),
        },
        {"transformer": Training(epochs=20, rate=2e-3), "recurrent": Training(epochs=19, rate=2e-3)},
    ),
    "tag": Preset(
        tag.Tag,
        read_tagged,
        {kind: tag.TagSettings(model=kind) for kind in ("recurrent", "transformer", "conv")},
        {kind: Training(epochs=30, batch=512) for kind in ("recurrent", "transformer", "conv")},
    ),
    "classify": Preset(
        classify.Classify,
        read_labeled,
        {kind: classify.ClassifySettings(model=kind) for kind in ("recurrent", "transformer", "conv")},
        {kind: Training(epochs=15, batch=1024) for kind in ("recurrent", "transformer", "conv")},
    ),
    "pronounce": Preset(
        translate.Translate,
        read_pairs,
        {
            "recurrent": translate.TranslateSettings(
                model="recurrent", units="symbols", width=128, hidden=256, layers=2, dropout=0.15, cell="lstm"
            ),
            "transformer": translate.TranslateSettings(units="symbols", width=128, hidden=256, layers=3),
        },
        {"recurrent": Training(epochs=10, rate=3e-3), "transformer": Training(epochs=10)},
        pronunciations,
    ),
}
