"""Loading of trained directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.tasks.classify import Classify
from regard.tasks.lines import DataError
from regard.tasks.tag import Tag
from regard.tasks.task import CONFIG, Task
from regard.tasks.translate import Translate

_TASKS: dict[str, type[Task]] = {task.kind: task for task in (Translate, Tag, Classify)}


def is_task(folder: Path) -> bool:
    """Return whether a directory was written by `regard train`."""
    try:
        return "task" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def open_task(folder: Path) -> Any:
    """Load the task in a directory that `regard train` wrote."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder}: is not a directory of a trained model ({CONFIG}: {error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from error
    kind = config.get("task") if isinstance(config, dict) else None
    if kind not in _TASKS:
        raise DataError(f"{path}: task is {kind!r}; expected one of {', '.join(_TASKS)}")
    return _TASKS[kind].load(folder, config)
