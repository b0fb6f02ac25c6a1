"""Components: the configurable parts of a call, and how they are split into a description and tensors.

A *component* (score, normalizer, mask, position bias or summary) is a frozen dataclass whose fields may contain
tensors. A call is split into its components with a `Slot` in place of each tensor, which are small, frozen, hashable
and serializable, and a flat list of tensors. Backends fill the slots with the tensors they compute on: the original
ones, a batch row of them, or leaves of a new autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Parameter

C = TypeVar("C")


@dataclass(frozen=True)
class Slot:
    """The placeholder of a tensor in a split component: its index in the list of tensors."""

    index: int


@dataclass(frozen=True)
class Recorded:
    """The placeholder of a Python function in a component that a compiler records: its index among the recorded ones."""

    index: int


def split(component: C, tensors: list[Tensor]) -> C:
    """Return the component with a `Slot` for each tensor, and append the tensors to `tensors`."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    return map_leaves(component, take)


def fill(component: C, tensors: Sequence[Tensor]) -> C:
    """The inverse of `split`: replace each `Slot` by its tensor."""
    return map_leaves(component, lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf)


def slots(component: Any) -> list[int]:
    """Return the indices of all slots in a component, in order."""
    indices: list[int] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            indices.append(leaf.index)
        return leaf

    map_leaves(component, note)
    return indices


def append_key(component: Any, kinds: Collection[type], key: list[Any], tensors: list[Tensor]) -> bool | None:
    """Append to `key` all fields of a component, or of a tuple of components, except the contents of tensors, and
    append the tensors to `tensors` in the order of `split`. Components with equal keys differ at most in these
    contents.

    Returns:
        Whether a component depends on the lengths of a problem, see `Mask.depends_on_lengths`. None if there is no key:
        the component contains a function, a tensor subclass or a nested tensor, or its class is not one of `kinds`.
    """
    kind = type(component)
    if kind is tuple:
        if all([type(part) is int for part in component]):  # noqa: C419, a generator takes longer
            key.append(component)  # a single entry for all rows of a summary
            return False
        parts, depends = component, False
    elif kind in kinds:
        parts = [getattr(component, name) for name in kind.__dataclass_fields__]
        depends = component.depends_on_lengths
    else:
        return None
    key += (kind, len(parts))
    for part in parts:
        kind = type(part)
        if kind in ATOMS:
            key.append(repr(part))  # distinguishes 1, 1.0 and True, and 0.0 and -0.0, which compare equal
        elif kind is Tensor or kind is Parameter:
            if part.is_nested:
                return None
            key += (part.shape, part.dtype, part.layout, part.device)
            tensors.append(part)
        else:
            found = append_key(part, kinds, key, tensors)
            if found is None:
                return None
            depends = depends or found
    return depends


# Immutable leaves.
ATOMS = frozenset({type(None), bool, int, float, str})


def map_leaves(component: C, change: Callable[[Any], Any]) -> C:
    """Apply `change` to the tensors, slots and functions of a component; return the same object if none changes."""
    names = _fields(type(component))
    if names is None:
        return change(component)  # type: ignore[no-any-return]
    # Plain loops, which torch.compile traces in a third of the time of comprehensions. Most components contain no tensor;
    # rebuilding them would slow down short calls.
    items, same = [], True
    for part in component if isinstance(component, tuple) else [getattr(component, name) for name in names]:
        new = part if type(part) in ATOMS else map_leaves(part, change)
        same = same and new is part
        items.append(new)
    if same:
        return component
    return tuple(items) if isinstance(component, tuple) else type(component)(*items)  # type: ignore[return-value]


def field_names(x: Any) -> tuple[str, ...] | None:
    """Return the names of the fields of a dataclass; None for anything else."""
    # Not by `dataclasses`, which torch.compile cannot trace in every version.
    fields = None if isinstance(x, type) else getattr(type(x), "__dataclass_fields__", None)
    return None if fields is None else tuple(fields)


def _fields(kind: type) -> tuple[str, ...] | None:
    """Return the names of a component's fields; None for anything else."""
    if kind is tuple:
        return ()
    # Neither `dataclasses.fields`, which torch.compile cannot trace for a class, nor a cache, which would make compiled
    # graphs recompile as it grows.
    fields = None if kind is Slot or kind is Recorded else getattr(kind, "__dataclass_fields__", None)
    return None if fields is None else tuple(fields)
