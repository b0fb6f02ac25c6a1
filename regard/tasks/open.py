"""Open a directory that training left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.tasks.classify import Classify
from regard.tasks.data import DataError
from regard.tasks.tag import Tag
from regard.tasks.task import CONFIG, Task
from regard.tasks.translate import Translate

_KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Translate, Tag, Classify)}


def is_task(folder: Path) -> bool:
    """Did `regard train` make this directory?"""
    try:
        return "task" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def open_task(folder: Path) -> Any:
    """The task in a directory, ready to predict."""
    place = folder / CONFIG
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder}: is no directory of a trained model ({CONFIG}: {error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{place}: is no JSON ({error})") from error
    kind = config.get("task") if isinstance(config, dict) else None
    if kind not in _KINDS:
        raise DataError(f"{place}: task is {kind!r}; expected one of {', '.join(_KINDS)}")
    return _KINDS[kind].load(folder, config)
