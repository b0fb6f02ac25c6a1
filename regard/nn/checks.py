"""Argument checks that several layers share. Each raises the error of `regard.check`, or returns nothing."""

from __future__ import annotations

from regard import check
from regard.components.mask import Mask


def check_features(name: str, x: object, axes: str, width: int) -> None:
    """Raise unless `x` is a float tensor of shape (*axes, width), where `axes` is written as in "B, S"."""
    fits = check.is_float_tensor(x)
    if not check.is_float_tensor(x) or x.dim() != axes.count(",") + 2 or x.shape[-1] != width:
        raise check.error(name, x, f"a float tensor of shape ({axes}, {width})", fits)


def check_mask(name: str, mask: object) -> None:
    """Raise unless `mask` is a `Mask` or None."""
    if mask is not None and not isinstance(mask, Mask):
        raise check.error(name, mask, "one of regard.mask, such as mask.lengths(n), True = may attend", False)


def check_probability(name: str, value: object) -> None:
    """Raise unless `value` is a number from 0 to 1."""
    if not check.is_number(value) or not 0.0 <= value <= 1.0:
        raise check.error(name, value, "a number from 0 to 1", check.is_number(value))


def check_batch_indices(name: str, rows: object) -> None:
    """Raise unless `rows` is an integer tensor of shape (N,), which holds batch indices."""
    if not check.is_integer_tensor(rows) or rows.dim() != 1:
        raise check.error(name, rows, "an integer tensor of shape (N,), batch indices", check.is_integer_tensor(rows))
