"""Checks that the words share, and how their errors are worded: the argument, what it is, and what was expected.

A wrong type (or dtype) is a TypeError, a wrong value (or shape) a ValueError.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from regard.components.tile import Align


def kind(value: object) -> str:
    """What was given, in an error: short, and without addresses in memory."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        layout = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor{layout} of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, list | tuple):
        parts = [kind(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)})"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return reprlib.repr(value)
    name = getattr(value, "__name__", None)
    return f"the function {name}" if callable(value) and name else f"an object of class {type(value).__name__}"


def shape(x: Tensor, inner: int = 2) -> tuple[int, ...]:
    """The shape of a tensor without the axes of 1 that were put before the `inner` ones to make it broadcast."""
    sizes = tuple(x.shape)
    while len(sizes) > inner and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def wrong(name: str, value: object, expected: str, type_fits: bool) -> Exception:
    """The error for a value that is not as expected: of the right type, or not even that."""
    return (ValueError if type_fits else TypeError)(f"{name} is {kind(value)}; expected {expected}")


def is_int(value: object) -> TypeGuard[int]:
    """Is it an int, and no bool?"""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Is it an int or a float, and no bool?"""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_floats(value: object) -> TypeGuard[Tensor]:
    """Is it an ordinary tensor of floats?"""
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided


def is_bools(value: object) -> TypeGuard[Tensor]:
    """Is it a tensor of bools?"""
    return isinstance(value, Tensor) and value.dtype == torch.bool


def is_ints(value: object) -> TypeGuard[Tensor]:
    """Is it a tensor of integers, which bools are not?"""
    other = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Tensor) and not other


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Does a tensor of this shape broadcast to the full one?"""
    missing = len(full) - len(shape)
    return missing >= 0 and all(got in (1, size) for got, size in zip(shape, full[missing:], strict=True))


def is_one_of(shape: Sequence[int], shapes: Collection[tuple[int, ...]]) -> bool:
    """Is this one of the shapes? Not by `in`, which misses sizes that a compiled graph leaves open."""
    return any(len(shape) == len(one) and all(x == y for x, y in zip(shape, one, strict=True)) for one in shapes)


def whole(name: str, value: object, least: int, note: str = "") -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not is_int(value) or value < least:
        raise wrong(name, value, f"an int >= {least}{note}", is_int(value))


def even(name: str, value: object) -> None:
    """Raise unless `value` is an even int of at least 2."""
    if not is_int(value) or value < 2 or value % 2:
        raise wrong(name, value, "an even int > 0", is_int(value))


def finite(name: str, value: object, note: str = "") -> None:
    """Raise unless `value` is a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise wrong(name, value, f"a finite number{note}", is_number(value))


def positive(name: str, value: object, note: str = "") -> None:
    """Raise unless `value` is a finite number > 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise wrong(name, value, f"a finite number > 0{note}", is_number(value))


def align(value: object) -> Align:
    """Raise unless `value` is "start", "end", an int or None; give it back."""
    if value is None or is_int(value) or (isinstance(value, str) and value in ("start", "end")):
        return value
    expected = '"start" (query 0 beside key 0), "end" (the last beside the last), or an int, the key beside query 0'
    raise wrong("align", value, expected, isinstance(value, str))


def floats(name: str, value: object, shapes: Collection[tuple[int, ...]], expected: str) -> None:
    """Raise unless `value` is an ordinary tensor of floats of one of the shapes, which `expected` tells."""
    if not is_floats(value) or not is_one_of(value.shape, shapes):
        raise wrong(name, value, f"floats of shape {expected}", is_floats(value))


def per_head(name: str, value: object, heads: int, positive: bool = False) -> None:
    """Raise unless `value` is a number (> 0, if it has to be positive), or a tensor of floats of shape () or (H,)."""
    if isinstance(value, Tensor):
        type_fits, good = is_floats(value), is_one_of(value.shape, ((), (heads,)))
    else:
        type_fits = is_number(value)
        good = is_number(value) and not math.isnan(value) and (value > 0 or not positive)
    if not (type_fits and good):
        number = "a number > 0" if positive else "a number"
        raise wrong(name, value, f"{number}, or floats of shape () or (H,) = ({heads},)", type_fits)
