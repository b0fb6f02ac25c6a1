"""Plans as text, for compiled and exported graphs.

A graph stores a plan as the Python expression that constructs it, so that exported programs can be saved and loaded
without pickle. Functions and classes defined by users cannot be serialized.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

import torch

from regard.components.component import ATOMS, Slot, field_names


def unserializable(component: Any, classes: dict[str, type[Any]]) -> str | None:
    """Return the name of the first part of a split component that cannot be serialized; None if there is none.
    Dataclasses must be among `classes`.
    """
    kind = type(component)
    if kind in ATOMS:
        return None
    if isinstance(component, tuple):
        parts = list(component)
    elif (names := field_names(component)) is not None:
        if classes.get(kind.__name__) is not kind:
            return f"the class {kind.__name__}"
        parts = [getattr(component, name) for name in names]
    elif isinstance(component, int | float | torch.SymInt | torch.SymFloat):
        return None
    elif not callable(component):
        return f"the class {kind.__name__}"
    else:
        return f"the Python function {getattr(component, '__name__', kind.__name__)}"
    for part in parts:
        if type(part) not in ATOMS and (name := unserializable(part, classes)) is not None:
            return name
    return None


@dataclass(frozen=True)
class Numbers:
    """The integers and floats of a serialized plan, apart from its text: in compiled graphs they may be symbols."""

    ints: list[Any] = field(default_factory=list)
    floats: list[Any] = field(default_factory=list)


def serialize(component: Any, numbers: Numbers) -> str:
    """Return a split component as the Python expression that constructs it, with I0, I1, ... and F0, F1, ... in place
    of its integers and floats, which are appended to `numbers`.
    """
    if isinstance(component, Slot):
        return f"Slot(index={component.index})"
    if (names := field_names(component)) is not None:
        parts = [f"{name}={serialize(getattr(component, name), numbers)}" for name in names]
        return f"{type(component).__name__}({', '.join(parts)})"
    if isinstance(component, tuple):
        return "(" + "".join([f"{serialize(part, numbers)}, " for part in component]) + ")"
    if component is None or isinstance(component, bool | str):
        return repr(component)
    if isinstance(component, int | torch.SymInt):
        numbers.ints.append(component)
        return f"I{len(numbers.ints) - 1}"
    assert isinstance(component, float | torch.SymFloat), f"{component!r} is unserializable"
    numbers.floats.append(component)
    return f"F{len(numbers.floats) - 1}"


def deserialize(text: str, numbers: Numbers, classes: dict[str, type[Any]]) -> Any:
    """The inverse of `serialize`. Only constructs objects of `classes`, so text from an untrusted file runs no code."""

    def build(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            if node.func.id not in classes:
                raise ValueError(f"plan: {node.func.id!r} is not a component of this version of regard")
            return classes[node.func.id](**{str(component.arg): build(component.value) for component in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(build(part) for part in node.elts)
        if isinstance(node, ast.Name):
            if node.id[0] not in "IF" or not node.id[1:].isdigit():
                raise ValueError(
                    f"plan: {node.id!r} is not a placeholder of a plan; expected I0, I1, ... or F0, F1, ..."
                )
            return (numbers.ints if node.id[0] == "I" else numbers.floats)[int(node.id[1:])]
        return ast.literal_eval(node)

    return build(ast.parse(text, mode="eval").body)
