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

# By module: the old name, and the new one, in the same module or with its path.
NAMES: dict[str, dict[str, str]] = {
    "regard": {"Seen": "AttentionSummary", "chosen": "record_backends"},
    "regard.components.summary": {"Seen": "AttentionSummary"},
    "regard.nn": {"Word": "ComponentModule"},
    "regard.nn.cell": {"State": "RecurrentState"},
    "regard.watch": {"Compared": "Comparison", "Traced": "Rollout", "Watched": "Recording"},
    "regard.view.data": {"Seen": "PageInput"},
    "regard.apps.look": {"Looked": "LookResult"},
    "regard.tasks.batch": {"deal": "make_batches"},
    "regard.tasks.classify": {"Encoded": "EncodedText", "Settings": "ClassifySettings"},
    "regard.tasks.data": {
        "Labelled": "Labeled",
        "Place": "Location",
        "read_labelled": "read_labeled",
        "split": "regard.tasks.split.split",
    },
    "regard.tasks.tag": {"Encoded": "EncodedSentence", "Settings": "TagSettings"},
    "regard.tasks.task": {"Tell": "ProgressCallback", "quiet": "ignore_progress"},
    "regard.tasks.translate": {"Encoded": "EncodedPair", "Settings": "TranslateSettings"},
}
# Modules whose path changed.
MODULES = {
    "regard.demo": "regard.apps.demo",
    "regard.doctor": "regard.apps.doctor",
    "regard.look": "regard.apps.look",
    "regard.look_at_image": "regard.apps.look_at_image",
}
# Methods, by class: the old name, and the new one.
METHODS: dict[str, dict[str, str]] = {"regard.components.rotary.Rotary": {"turn": "rotate"}}
# Attributes, by class: the old name, and the new one.
ATTRIBUTES: dict[str, dict[str, str]] = {"regard.apps.look.LookResult": {"watched": "recording"}}
# Values of `attention(backend=...)`.
BACKENDS = {"gpu": "triton", "torch": "sdpa"}


def getter(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that resolves its old names."""

    def get(name: str) -> Any:
        new = NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name} is now called {new}", 3)
        return resolve(module, new)

    return get


def resolve(module: str, new: str) -> Any:
    """Return the object of a new name in `NAMES`."""
    owner, _, attribute = new.rpartition(".")
    return getattr(importlib.import_module(owner or module), attribute)


def method(owner: str, old: str) -> Callable[..., Any]:
    """Return a method that calls the method of the new name; `owner` is a class in `METHODS`."""
    new = METHODS[owner][old]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn(f"{owner}.{old} is now called {new}", 3)
        return getattr(self, new)(*args, **kwargs)

    call.__doc__ = f"Deprecated name of `{new}`."
    return call


def attribute(owner: str, old: str) -> property:
    """Return a property that reads the attribute of the new name; `owner` is a class in `ATTRIBUTES`."""
    new = ATTRIBUTES[owner][old]

    def get(self: Any) -> Any:
        """Deprecated name of an attribute."""
        _warn(f"{owner}.{old} is now called {new}", 3)
        return getattr(self, new)

    return property(get)


def resolve_backend(backend: str | None, kernel: str | None) -> str | None:
    """Return the value of `backend=`, or of the deprecated `kernel=`, with deprecated values replaced."""
    if kernel is not None:
        if backend is not None:
            raise ValueError(
                f"kernel is {kernel!r} and backend is {backend!r}; expected backend alone (kernel is its old name)"
            )
        _warn("the argument kernel is now called backend", 4)
        backend = kernel
    if isinstance(backend, str) and backend in BACKENDS:
        _warn(f"the backend {backend!r} is now called {BACKENDS[backend]!r}", 4)
        return BACKENDS[backend]
    return backend


def _warn(message: str, stacklevel: int) -> None:
    if not torch.compiler.is_compiling():  # the compiler cannot trace a warning
        warnings.warn(f"{message}; the old name works until version 0.3", DeprecationWarning, stacklevel=stacklevel)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer that resolves old module paths to the modules of the new paths."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        _warn(f"the module {spec.name} is now called {new}", 2)
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec of the module, which was executed under its new path."""
        module.__spec__ = self._specs.pop(module.__name__)


def install() -> None:
    """Install the importer of old module paths."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
