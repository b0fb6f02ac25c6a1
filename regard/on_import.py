"""Run a function as soon as a module of another package is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def on_import(module: str, call: Callable[[], None]) -> None:
    """Call a function now if a module is imported already, otherwise once it has been executed."""
    if module in sys.modules:
        call()
    elif not any(isinstance(finder, _Hook) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook(module, call))


class _Hook(importlib.abc.MetaPathFinder):
    """Finds the module as Python does, and calls the function once it has been executed."""

    def __init__(self, module: str, call: Callable[[], None]) -> None:
        self.module, self.call = module, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.call()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
