"""Argument checks, and the wording of their errors: the argument, what was given, and what was expected.

A wrong type (or dtype) raises a TypeError, a wrong value (or shape) a ValueError.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from regard.components.tile import Align


def describe(value: object) -> str:
    """Describe a value in an error message: briefly, and without memory addresses."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        layout = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor{layout} of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, list | tuple):
        parts = [describe(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)})"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return reprlib.repr(value)
    name = getattr(value, "__name__", None)
    return f"the function {name}" if callable(value) and name else f"an object of class {type(value).__name__}"


def shape(x: Tensor, inner: int = 2) -> tuple[int, ...]:
    """Return the shape of a tensor without leading dimensions of size 1, except for the last `inner` dimensions."""
    sizes = tuple(x.shape)
    while len(sizes) > inner and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def error(name: str, value: object, expected: str, type_fits: bool) -> Exception:
    """Return a ValueError for a value of the right type, a TypeError otherwise."""
    return (ValueError if type_fits else TypeError)(f"{name} is {describe(value)}; expected {expected}")


def is_int(value: object) -> TypeGuard[int]:
    """Return whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is an int or a float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_float_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether `value` is a strided tensor of a floating-point dtype."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided


def is_bool_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether `value` is a bool tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.bool


def is_integer_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether `value` is a tensor of an integer dtype (not bool)."""
    other = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Tensor) and not other


def result_for_tile(name: str, x: object, shape: Sequence[int], type_fits: bool, kind: str) -> None:
    """Raise unless what a function returned for a tile of this shape is a tensor of the right kind that broadcasts to it."""
    if not type_fits or not isinstance(x, Tensor) or not broadcasts(x.shape, shape):
        raise error(
            f"{name} for a tile (b, h, l, s) = {tuple(shape)}", x, f"a {kind} tensor that broadcasts to it", type_fits
        )


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Return whether a tensor of this shape broadcasts to the shape `full`."""
    missing = len(full) - len(shape)
    return missing >= 0 and all(got in (1, size) for got, size in zip(shape, full[missing:], strict=True))


def is_one_of(shape: Sequence[int], shapes: Collection[tuple[int, ...]]) -> bool:
    """Return whether `shape` equals one of `shapes`. Unlike `in`, this works with symbolic sizes of a compiled
    graph.
    """
    return any(len(shape) == len(one) and all(x == y for x, y in zip(shape, one, strict=True)) for one in shapes)


def integer(name: str, value: object, least: int, note: str = "") -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not is_int(value) or value < least:
        raise error(name, value, f"an integer >= {least}{note}", is_int(value))


def even_integer(name: str, value: object) -> None:
    """Raise unless `value` is an even int of at least 2."""
    if not is_int(value) or value < 2 or value % 2:
        raise error(name, value, "an even integer > 0", is_int(value))


def finite(name: str, value: object, note: str = "") -> None:
    """Raise unless `value` is a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise error(name, value, f"a finite number{note}", is_number(value))


def positive(name: str, value: object, note: str = "") -> None:
    """Raise unless `value` is a finite number > 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise error(name, value, f"a finite number > 0{note}", is_number(value))


def align(value: object) -> Align:
    """Return `value`; raise unless it is "start", "end", an int or None."""
    if value is None or is_int(value) or (isinstance(value, str) and value in ("start", "end")):
        return value
    expected = '"start" (query 0 at key 0), "end" (last query at the last key), or an integer, the key of query 0'
    raise error("align", value, expected, isinstance(value, str))


def float_tensor(name: str, value: object, shapes: Collection[tuple[int, ...]], expected: str) -> None:
    """Raise unless `value` is a strided float tensor of one of `shapes`, which `expected` describes."""
    if not is_float_tensor(value) or not is_one_of(value.shape, shapes):
        raise error(name, value, f"a float tensor of shape {expected}", is_float_tensor(value))


def per_head(name: str, value: object, heads: int, positive: bool = False) -> None:
    """Raise unless `value` is a number (> 0 if `positive`) or a float tensor of shape () or (H,)."""
    if isinstance(value, Tensor):
        type_fits, fits = is_float_tensor(value), is_one_of(value.shape, ((), (heads,)))
    else:
        type_fits = is_number(value)
        fits = is_number(value) and not math.isnan(value) and (value > 0 or not positive)
    if not (type_fits and fits):
        number = "a number > 0" if positive else "a number"
        raise error(name, value, f"{number}, or a float tensor of shape () or (H,) = ({heads},)", type_fits)
