"""Components: the configurable parts of a call, and how they are split into a description and tensors.

A *component* (a score, a normalizer, a mask, a position bias, a summary) is a frozen dataclass. Some of its fields may hold
tensors. A call is split in two: the components with a `Slot` in the place of each tensor, which are small, frozen and
hashable and can be serialized, and the flat list of tensors. Backends join the two again, with whichever tensors they
compute on: the originals, a batch row of them, or leaves of a new autograd graph.
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
    """The placeholder of a tensor that was taken out of a component: its index in the list of tensors."""

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
    found: list[int] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            found.append(leaf.index)
        return leaf

    map_leaves(component, note)
    return found


def append_key(component: Any, kinds: Collection[type], key: list[Any], tensors: list[Tensor]) -> bool:
    """Append to `key` everything a component, or a tuple of components, holds except the contents of its tensors, and its
    tensors to `tensors`, in the order of `split`. Components with equal keys are equal but for those contents.

    Returns:
        False where no key can be made: the component holds a function, a tensor subclass or a nested tensor, or its class is
        not one of `kinds`.
    """
    kind = type(component)
    if kind is not tuple and kind not in kinds:
        return False
    parts = component if kind is tuple else [getattr(component, name) for name in kind.__dataclass_fields__]
    if kind is tuple and all([type(part) is int for part in parts]):  # noqa: C419, a generator takes longer
        key.append(parts)  # one entry, however many rows a summary names
        return True
    key += (kind, len(parts))
    for part in parts:
        kind = type(part)
        if kind in _ATOMS:
            key.append(repr(part))  # 1, 1.0 and True are equal, and so are 0.0 and -0.0, but they are not the same
        elif kind is Tensor or kind is Parameter:
            if part.is_nested:
                return False
            key += (part.shape, part.dtype, part.layout, part.device)
            tensors.append(part)
        elif not append_key(part, kinds, key, tensors):
            return False
    return True


# Immutable leaves that are no components.
_ATOMS = frozenset({type(None), bool, int, float, str})


def map_leaves(component: C, change: Callable[[Any], Any]) -> C:
    """Return the component with `change` applied to the tensors, slots and functions in it; the same object if none changes."""
    names = _fields(type(component))
    if names is None:
        return change(component)  # type: ignore[no-any-return]
    parts = component if isinstance(component, tuple) else [getattr(component, name) for name in names]
    # Most components hold no tensor: for short calls, rebuilding them would be noticed.
    changed = {}
    for index, part in enumerate(parts):
        if type(part) not in _ATOMS:
            new = map_leaves(part, change)
            if new is not part:
                changed[index] = new
    if not changed:
        return component
    items = [changed.get(index, part) for index, part in enumerate(parts)]
    return tuple(items) if isinstance(component, tuple) else type(component)(*items)  # type: ignore[return-value]


def _fields(kind: type) -> tuple[str, ...] | None:
    """Return the names of a component's fields; None for anything else."""
    if kind is tuple:
        return ()
    # Neither `dataclasses.fields`, which torch.compile cannot trace for a class, nor a cache, which would make compiled
    # graphs recompile as it grows.
    fields = None if kind is Slot else getattr(kind, "__dataclass_fields__", None)
    return None if fields is None else tuple(fields)
