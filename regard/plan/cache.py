"""Plan cache, keyed by everything in a call except the contents of its tensors.

For a short sequence, checking a call takes longer than computing it. So what a component's `check` decides, and what a backend
derives from a plan, may depend on the fields of components and on the shapes, dtypes, layouts and devices of tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from regard.components.component import append_key
from regard.plan.arguments import CACHEABLE
from regard.plan.problem import Plan

_MAX_ENTRIES = 1024

F = TypeVar("F", bound=Callable[..., Any])


class Entry(NamedTuple):
    """The result of a call that was checked before."""

    plan: Plan
    score_name: str
    is_unchanged: bool  # q, k and v are those of the call, and the score holds no tensor
    start: int  # of all tensors of the call, those from here on belong to the components after the score
    stop: int  # and from here on, to the summary


_entries: dict[tuple[Any, ...], Entry] = {}
_derived: list[Any] = []


def make_key(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[Tensor]]:
    """Return the key of a call's arguments, and their tensors in order; None where the call cannot be cached."""
    key: list[Any] = []
    tensors: list[Tensor] = []
    # While a graph is traced, sizes are symbols or tensors, which are good for this call alone.
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    readable = not traced and append_key(arguments, CACHEABLE, key, tensors)
    return tuple(key) if readable else None, tensors


def get(key: tuple[Any, ...] | None) -> Entry | None:
    """Return the entry of a key, if there is one."""
    return None if key is None else _entries.get(key)


def put(key: tuple[Any, ...], entry: Entry) -> None:
    """Keep an entry. A full cache is emptied first."""
    if len(_entries) >= _MAX_ENTRIES:
        _entries.clear()
    _entries[key] = entry


def derived(function: F) -> F:
    """Cache the results of a function of plans, shapes and the like, until `clear` is called."""
    cached = lru_cache(_MAX_ENTRIES)(function)
    _derived.append(cached)
    return cached  # type: ignore[return-value]


def clear() -> None:
    """Forget all calls, and everything that was derived from their plans. Results do not change; the next calls take longer."""
    _entries.clear()
    for cached in _derived:
        cached.cache_clear()
