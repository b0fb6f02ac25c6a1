"""What `regard train` can learn, and the settings that it begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.tasks import classify, tag, translate
from regard.tasks.data import read_labelled, read_pairs, read_tagged
from regard.tasks.pronounce import pronunciations
from regard.tasks.task import Task
from regard.tasks.train import Training


@dataclass(frozen=True)
class Preset:
    """A task to learn, with settings that do well.

    Args:
        task: its kind.
        read: files as examples. built_in: examples that come as a package, where no files are given.
        settings, training: by the name of the model; the first is the default.
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
            "transformer": translate.Settings(),
            "recurrent": translate.Settings(model="recurrent", layers=1, dropout=0.3),
        },
        {"transformer": Training(epochs=20, rate=2e-3), "recurrent": Training(epochs=19, rate=2e-3)},
    ),
    "tag": Preset(
        tag.Tag,
        read_tagged,
        {kind: tag.Settings(model=kind) for kind in ("recurrent", "transformer", "conv")},
        {kind: Training(epochs=30, batch=512) for kind in ("recurrent", "transformer", "conv")},
    ),
    "classify": Preset(
        classify.Classify,
        read_labelled,
        {kind: classify.Settings(model=kind) for kind in ("recurrent", "transformer", "conv")},
        {kind: Training(epochs=15, batch=1024) for kind in ("recurrent", "transformer", "conv")},
    ),
    "pronounce": Preset(
        translate.Translate,
        read_pairs,
        {
            "recurrent": translate.Settings(
                model="recurrent", units="symbols", width=128, hidden=256, layers=2, dropout=0.15, cell="lstm"
            ),
            "transformer": translate.Settings(units="symbols", width=128, hidden=256, layers=3),
        },
        {"recurrent": Training(epochs=10, rate=3e-3), "transformer": Training(epochs=10)},
        pronunciations,
    ),
}
