"""Names of version 0.1 that still work, with a `DeprecationWarning`. All of them go in version 0.3."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

# By module: the old name, and the new one in the same module.
NAMES: dict[str, dict[str, str]] = {
    "regard": {"Seen": "AttentionSummary", "chosen": "record_backends"},
    "regard.components.summary": {"Seen": "AttentionSummary"},
    "regard.nn": {"Word": "ComponentModule"},
    "regard.watch": {"Compared": "Comparison", "Traced": "Rollout", "Watched": "Recording"},
    "regard.view.data": {"Seen": "PageInput"},
    "regard.apps.look": {"Looked": "LookResult"},
}
# Modules whose path changed.
MODULES = {
    "regard.demo": "regard.apps.demo",
    "regard.doctor": "regard.apps.doctor",
    "regard.look": "regard.apps.look",
    "regard.look_at_image": "regard.apps.look_at_image",
}
# Values of `attention(backend=...)`.
BACKENDS = {"gpu": "triton", "torch": "sdpa"}


def getter(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module, which resolves its old names."""

    def get(name: str) -> Any:
        new = NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name} is called {new} now", 3)
        return getattr(sys.modules[module], new)

    return get


def resolve_backend(backend: str | None, kernel: str | None) -> str | None:
    """Return the backend that a call names, by `backend=` or by the old `kernel=`, under its new name."""
    if kernel is not None:
        if backend is not None:
            raise ValueError(
                f"kernel is {kernel!r} and backend is {backend!r}; expected backend alone (kernel is its old name)"
            )
        _warn("the argument kernel is called backend now", 4)
        backend = kernel
    if isinstance(backend, str) and backend in BACKENDS:
        _warn(f"the backend {backend!r} is called {BACKENDS[backend]!r} now", 4)
        return BACKENDS[backend]
    return backend


def _warn(message: str, stacklevel: int) -> None:
    if not torch.compiler.is_compiling():  # the compiler cannot trace a warning
        warnings.warn(f"{message}; the old name works until version 0.3", DeprecationWarning, stacklevel=stacklevel)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves imports of old module paths to the modules themselves."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        _warn(f"the module {spec.name} is called {new} now", 2)
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its own name, and keeps its own spec."""
        module.__spec__ = self._specs.pop(module.__name__)


def install() -> None:
    """Let old module paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
