"""Plan cache, keyed by everything in a call except the contents of its tensors.

For short sequences, checking a call takes longer than computing it. Therefore `check` of components, and everything
that a backend derives from a plan, depend only on the fields of components and on the shapes, dtypes, layouts and
devices of tensors.
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
from regard.tracing import is_symbolic, is_tracing

_MAX_ENTRIES = 1024
_MAX_IDENTITIES = 64
_TENSORS = (Tensor, torch.nn.Parameter)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
R = TypeVar("R")


class Entry(NamedTuple):
    """The result of checking a call."""

    plan: Plan
    is_unchanged: bool  # q, k and v are those of the call, and the score contains no tensor
    start: int  # index of the first tensor of the components after the score, among all tensors of the call
    stop: int  # index of the first tensor of the summary


_entries: dict[tuple[Any, ...], Entry] = {}
_derived: list[Any] = []


def make_key(
    q: Tensor, k: Tensor, v: Tensor, components: tuple[Any, ...], bias: Any, is_eager: bool
) -> tuple[tuple[Any, ...] | None, list[Tensor]]:
    """Return the key of a call's arguments and their tensors in order; the key is None if the call cannot be cached.

    The lengths L and S are part of the key only if a component depends on them: each step of decoding with a growing cache
    has the key of the one before.

    Args:
        components: all arguments besides q, k and v, in the order in which a plan takes their tensors.
        bias: the bias among them. A tensor has to broadcast to (B, H, L, S).
        is_eager: see `tracing.is_eager`.
    """
    tensors: list[Tensor] = []
    for x in (q, k, v):
        if type(x) not in _TENSORS or x.is_nested or x.dim() < 2:
            return None, tensors
        tensors.append(x)
    # While a graph is traced, sizes are symbols or tensors, which are valid for this call only.
    if not is_eager and (is_symbolic(q) or is_tracing()):
        return None, tensors
    key: list[Any] = [q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.layout, k.layout, v.layout]
    depends_on_lengths = append_key(components, CACHEABLE, key, tensors)
    if depends_on_lengths is None:
        return None, tensors
    shapes = q.shape, k.shape, v.shape
    if depends_on_lengths or isinstance(bias, Tensor):
        key += shapes
    else:
        L, S, T = [shape[-2] for shape in shapes]
        # Alignment may be left out where L = S.
        key += (L == S, S == T, *[shape[:-2] for shape in shapes], *[shape[-1] for shape in shapes])
    return tuple(key), tensors


def get(key: tuple[Any, ...] | None) -> Entry | None:
    """Return the entry of a key, if there is one."""
    return None if key is None else _entries.get(key)


def put(key: tuple[Any, ...], entry: Entry) -> None:
    """Store an entry. A full cache is cleared first."""
    if len(_entries) >= _MAX_ENTRIES:
        _entries.clear()
    _entries[key] = entry


def derived(function: F, max_entries: int = _MAX_ENTRIES) -> F:
    """Decorate a function of plans and shapes to cache its results until `clear` is called."""
    cached = lru_cache(max_entries)(function)
    _derived.append(cached)
    return cached  # type: ignore[return-value]


def by_identity(function: Callable[[T], R]) -> Callable[[T], R]:
    """Decorate a function of one immutable object to cache its results, by the object itself: comparing it with others
    would take longer.
    """
    kept: dict[int, tuple[T, R]] = {}

    def get(x: T) -> R:
        entry = kept.get(id(x))
        if entry is None or entry[0] is not x:
            if len(kept) >= _MAX_IDENTITIES:
                kept.clear()
            entry = kept[id(x)] = x, function(x)
        return entry[1]

    return get


def clear() -> None:
    """Clear the cache of plans, and of everything derived from them. Only affects the time of the next calls."""
    _entries.clear()
    for cached in _derived:
        cached.cache_clear()
