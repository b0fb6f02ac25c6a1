"""What a word of the vocabulary is, and how it is taken apart and put together again.

A *word* (a score, a normalizer, a mask, a position, a summary) is a frozen dataclass. Some of its fields may hold
tensors. A call is split in two: the words with a `Slot` in the place of each tensor, which are small, frozen and
hashable and can be written as text, and the flat list of tensors. Kernels put the two together again, with whichever
tensors they compute on: the originals, a batch row of them, or leaves of a fresh autograd graph.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

W = TypeVar("W")


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that was taken out of a word: its index in the list of tensors."""

    index: int


def split(word: W, tensors: list[Tensor]) -> W:
    """The word with a `Slot` for each tensor; the tensors are appended to `tensors`."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    return rebuild(word, take)


def fill(word: W, tensors: Sequence[Tensor]) -> W:
    """The inverse of `split`: each `Slot` is replaced by its tensor."""
    return rebuild(word, lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf)


def slots(word: Any) -> list[int]:
    """The indices of all slots in a word, in order."""
    found: list[int] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            found.append(leaf.index)
        return leaf

    rebuild(word, note)
    return found


def read(word: Any, kinds: Collection[type], text: list[Any], tensors: list[Tensor]) -> bool:
    """Append to `text` all that a word, or a tuple of words, says but the numbers in its tensors, and those, in the order of
    `split`, to `tensors`: words that read alike are alike. False where that cannot be told, since one holds a function, a
    tensor of a class of its own, or a word that is not of these kinds.
    """
    kind = type(word)
    if kind is not tuple and kind not in kinds:
        return False
    parts = word if kind is tuple else [getattr(word, name) for name in kind.__dataclass_fields__]
    text += (kind, len(parts))
    for part in parts:
        kind = type(part)
        if kind in _ATOMS:
            text.append(repr(part))  # 1, 1.0 and True are equal, and so are 0.0 and -0.0, but they are not the same
        elif kind is Tensor or kind is Parameter:
            if part.is_nested:
                return False
            text += (part.shape, part.dtype, part.layout, part.device)
            tensors.append(part)
        elif not read(part, kinds, text, tensors):
            return False
    return True


# What no word is made of and nothing changes.
_ATOMS = frozenset({type(None), bool, int, float, str})


def rebuild(word: W, change: Callable[[Any], Any]) -> W:
    """The word with `change` applied to the tensors, slots and functions in it; the same object if nothing changes."""
    names = _fields(type(word))
    if names is None:
        return change(word)  # type: ignore[no-any-return]
    parts = word if isinstance(word, tuple) else [getattr(word, name) for name in names]
    # Most words hold no tensor, and a call has no microsecond to lose: they are not made anew.
    changed = {}
    for index, part in enumerate(parts):
        if type(part) not in _ATOMS:
            new = rebuild(part, change)
            if new is not part:
                changed[index] = new
    if not changed:
        return word
    items = [changed.get(index, part) for index, part in enumerate(parts)]
    return tuple(items) if isinstance(word, tuple) else type(word)(*items)  # type: ignore[return-value]


def _fields(kind: type) -> tuple[str, ...] | None:
    """The names of a word's fields; None for what is no word."""
    if kind is tuple:
        return ()
    # Not `dataclasses.fields`, which torch.compile cannot trace for a class, nor any cache: a graph that was traced through
    # one is traced again once it has grown.
    fields = None if kind is Slot else getattr(kind, "__dataclass_fields__", None)
    return None if fields is None else tuple(fields)


# A compiled graph holds a plan as text, so that an exported program can be read, saved and loaded without pickle. Python
# code cannot be written down: neither functions nor the classes of users.
def unwritable(word: Any, vocabulary: dict[str, type[Any]]) -> str | None:
    """The name of the first part of a split word that `describe` cannot write, or that `parse` could not read; None if there
    is none.
    """
    kind = type(word)
    if isinstance(word, tuple):
        parts = list(word)
    elif dataclasses.is_dataclass(word) and not isinstance(word, type):
        if vocabulary.get(kind.__name__) is not kind:
            return f"the class {kind.__name__}"
        parts = [getattr(word, name) for name in kind.__dataclass_fields__]
    elif word is None or isinstance(word, bool | str | int | float | torch.SymInt | torch.SymFloat):
        return None
    else:
        return f"the Python function {getattr(word, '__name__', kind.__name__)}"
    return next((name for name in [unwritable(part, vocabulary) for part in parts] if name is not None), None)


@dataclass(frozen=True)
class Numbers:
    """The numbers of a plan that is written as text: they stand beside it, since a compiled graph may leave them open."""

    whole: list[Any] = field(default_factory=list)
    real: list[Any] = field(default_factory=list)


def describe(word: Any, numbers: Numbers) -> str:
    """A split word as text, in the form of the Python expression that makes it, with W0, W1, ... and R0, R1, ... in the
    places of its whole and real numbers, which are appended to `numbers`.
    """
    if dataclasses.is_dataclass(word) and not isinstance(word, type):
        if isinstance(word, Slot):
            return f"Slot(index={word.index})"
        parts = [f"{part.name}={describe(getattr(word, part.name), numbers)}" for part in dataclasses.fields(word)]
        return f"{type(word).__name__}({', '.join(parts)})"
    if isinstance(word, tuple):
        return "(" + "".join([f"{describe(part, numbers)}, " for part in word]) + ")"
    if word is None or isinstance(word, bool | str):
        return repr(word)
    if isinstance(word, int | torch.SymInt):
        numbers.whole.append(word)
        return f"W{len(numbers.whole) - 1}"
    assert isinstance(word, float | torch.SymFloat), f"{word!r} is unwritable"
    numbers.real.append(word)
    return f"R{len(numbers.real) - 1}"


def parse(text: str, numbers: Numbers, vocabulary: dict[str, type[Any]]) -> Any:
    """The inverse of `describe`. Only the given classes can come out of it: text from a file runs no code."""

    def build(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            if node.func.id not in vocabulary:
                raise ValueError(f"plan: {node.func.id!r} is no word of this version of regard")
            return vocabulary[node.func.id](**{str(word.arg): build(word.value) for word in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(build(part) for part in node.elts)
        if isinstance(node, ast.Name):
            if node.id[0] not in "WR" or not node.id[1:].isdigit():
                raise ValueError(f"plan: {node.id!r} is no number of a plan, which are W0, W1, ... and R0, R1, ...")
            return (numbers.whole if node.id[0] == "W" else numbers.real)[int(node.id[1:])]
        return ast.literal_eval(node)

    return build(ast.parse(text, mode="eval").body)
