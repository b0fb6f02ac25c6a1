"""Names of version 0.1 still work, and warn with a DeprecationWarning at the line of the caller."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import regard
from regard import deprecated, position
from regard.apps.look import LookResult

NAMES = [(module, old, new) for module, names in deprecated.NAMES.items() for old, new in names.items()]
METHODS = [(owner, old, new) for owner, names in deprecated.METHODS.items() for old, new in names.items()]
ATTRIBUTES = [(owner, old, new) for owner, names in deprecated.ATTRIBUTES.items() for old, new in names.items()]
# An instance per class whose methods or attributes were renamed, and arguments for each method.
INSTANCES: dict[str, Callable[[], Any]] = {
    "regard.components.rotary.Rotary": lambda: position.Rotary(4),
    "regard.apps.look.LookResult": lambda: object.__new__(LookResult),
}
ARGUMENTS = {("regard.components.rotary.Rotary", "turn"): (torch.ones(3, 4), torch.arange(3))}


def warned(call: Callable[[], Any], *parts: str) -> Any:
    """Return the result of a call that warns once, here, with all parts of the message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert [warning.category for warning in caught] == [DeprecationWarning]
    message = str(caught[0].message)
    assert all(part in message for part in (*parts, "until version 0.3")), message
    assert caught[0].filename == __file__
    return result


@pytest.mark.parametrize(("module", "old", "new"), NAMES, ids=[f"{module}.{old}" for module, old, _ in NAMES])
def test_deprecated_names(module: str, old: str, new: str) -> None:
    loaded = importlib.import_module(module)
    assert warned(lambda: getattr(loaded, old), f"{module}.{old}", new) is deprecated.resolve(module, new)
    assert old not in getattr(loaded, "__all__", ())


@pytest.mark.parametrize("module", deprecated.NAMES)
def test_unknown_names_raise_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'"):
        _ = importlib.import_module(module).Nothing


@pytest.mark.parametrize(("old", "new"), deprecated.MODULES.items())
def test_deprecated_modules(old: str, new: str) -> None:
    """In a new process, where neither path has been imported."""
    code = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    import {old} as old\n"
        f"new = importlib.import_module({new!r})\n"
        f"assert old is new and new.__spec__.name == new.__name__ == {new!r}\n"
        "messages = [str(x.message) for x in caught if issubclass(x.category, DeprecationWarning)]\n"
        f"assert sum({old!r} in x and {new!r} in x for x in messages) == 1, messages\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("owner", "old", "new"), METHODS, ids=[f"{owner}.{old}" for owner, old, _ in METHODS])
def test_deprecated_methods(owner: str, old: str, new: str) -> None:
    instance, arguments = INSTANCES[owner](), ARGUMENTS[owner, old]
    got = warned(lambda: getattr(instance, old)(*arguments), f"{owner}.{old}", new)
    assert torch.equal(got, getattr(instance, new)(*arguments))


@pytest.mark.parametrize(("owner", "old", "new"), ATTRIBUTES, ids=[f"{owner}.{old}" for owner, old, _ in ATTRIBUTES])
def test_deprecated_attributes(owner: str, old: str, new: str) -> None:
    instance, value = INSTANCES[owner](), object()
    object.__setattr__(instance, new, value)
    assert warned(lambda: getattr(instance, old), f"{owner}.{old}", new) is value


@pytest.mark.parametrize("argument", ["backend", "kernel"])
@pytest.mark.parametrize(("old", "new"), deprecated.BACKENDS.items())
def test_deprecated_backend_values(old: str, new: str, argument: str) -> None:
    values = {"backend": None, "kernel": None, argument: old}
    with pytest.warns(DeprecationWarning, match=f"the backend {old!r} is now called {new!r}"):
        assert deprecated.resolve_backend(**values) == new


def test_deprecated_backend_value_in_attention() -> None:
    x = torch.randn(1, 2, 5, 4)
    with regard.record_backends() as ran:
        out = warned(lambda: regard.attention(x, x, x, backend="torch"), "'torch'", "'sdpa'")
    assert ran == ["sdpa"]
    assert torch.equal(out, regard.attention(x, x, x, backend="sdpa"))


@pytest.mark.parametrize("name", ["cpu", "sdpa", "tiled", "reference"])
def test_kernel_argument(name: str) -> None:
    x = torch.randn(1, 2, 5, 4)
    with regard.record_backends() as ran:
        out = warned(lambda: regard.attention(x, x, x, kernel=name), "argument kernel", "backend")
    assert ran == [name]
    assert torch.equal(out, regard.attention(x, x, x, backend=name))


@pytest.mark.parametrize(("backend", "kernel"), [("tiled", "reference"), ("tiled", "tiled"), ("sdpa", "torch")])
def test_backend_together_with_kernel_raises(backend: str, kernel: str) -> None:
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=f"kernel is '{kernel}' and backend is '{backend}'; expected backend alone"):
        regard.attention(x, x, x, backend=backend, kernel=kernel)


def test_new_names_do_not_warn() -> None:
    x = torch.randn(1, 2, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module, _, new in NAMES:
            deprecated.resolve(module, new)
        for owner, old, new in METHODS:
            getattr(INSTANCES[owner](), new)(*ARGUMENTS[owner, old])
        regard.attention(x, x, x, backend="sdpa")
