"""Plans as text, as operators of compiled and exported graphs take them."""

from __future__ import annotations

from typing import Any

from regard.components import component, function, graph, mask, normalizer, position, score, statistic, summary
from regard.components.serialization import Numbers, deserialize, serialize, unserializable
from regard.plan import problem
from regard.plan.problem import Plan

# The classes that a plan may be made of in a graph: those of the package.
_CLASSES: dict[str, type[Any]] = {
    name: kind
    for module in (score, function, graph, normalizer, mask, position, statistic, summary, problem, component)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
}


def to_text(plan: Plan) -> tuple[str, list[Any], list[Any]]:
    """Return a plan as text, with its integers and floats apart."""
    numbers = Numbers()
    text = serialize(plan, numbers)
    return text, numbers.ints, numbers.floats


def from_text(text: str, ints: list[Any], floats: list[Any]) -> Plan:
    """The inverse of `to_text`."""
    plan: Plan = deserialize(text, Numbers(ints, floats), _CLASSES)
    return plan


def has_text(kind: type[Any]) -> bool:
    """Return whether a class of components is one of the package: those of users have no text."""
    return _CLASSES.get(kind.__name__) is kind


def has_no_text(plan: Plan) -> str | None:
    """Return the name of a part of a plan that has no text; None if there is none."""
    return unserializable(plan, _CLASSES)
