"""The public API is what `public_api.txt` lists: a change to it is a change to that file, and so is seen.

python tests/test_public_api.py > tests/public_api.txt    # after a change that is meant
"""

from __future__ import annotations

import enum
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import regard
from regard import mask, nn, normalizer, position, score, summary
from regard.nn import recurrent, vision
from regard.view import figure, page
from regard.watch.analysis import heads
from regard.watch.recording import record, recording

_FILE = Path(__file__).with_name("public_api.txt")
# `regard.watch` is the function; its package is in sys.modules.
_MODULES = {
    "regard": regard, "regard.score": score, "regard.normalizer": normalizer, "regard.mask": mask,
    "regard.position": position, "regard.summary": summary, "regard.nn": nn, "regard.nn.recurrent": recurrent,
    "regard.nn.vision": vision, "regard.watch": sys.modules["regard.watch"], "regard.watch.heads": heads,
    "regard.watch.record": record, "regard.watch.recording": recording, "regard.view.page": page,
    "regard.view.figure": figure,
}  # fmt: skip


def _names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    )


def _signature(thing: Any) -> str:
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def _members(kind: type) -> list[str]:
    """The public methods and properties that a class defines itself."""
    lines = []
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_") or isinstance(kind, enum.EnumMeta):
            continue
        member = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if inspect.isfunction(member):
            lines.append(f"    .{name}{_signature(member)}")
        elif isinstance(member, property):
            lines.append(f"    .{name}")
    return lines


def describe() -> str:
    """One line per public name, with its parameters and defaults, and one per public member of a class."""
    lines = []
    for title, module in _MODULES.items():
        for name in _names(module):
            thing = getattr(module, name)
            if isinstance(thing, ModuleType):
                lines.append(f"{title}.{name}: module")
            elif inspect.isclass(thing):
                lines += [f"{title}.{name}{_signature(thing)}", *_members(thing)]
            elif callable(thing):
                lines.append(f"{title}.{name}{_signature(thing)}")
            elif name != "__version__":
                lines.append(f"{title}.{name}")
    return "\n".join(lines) + "\n"


def test_public_api_is_unchanged() -> None:
    assert describe() == _FILE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(describe(), end="")
