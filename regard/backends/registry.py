"""The backends, in the order of preference: the one table that names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from regard.backends import reference, sdpa
from regard.backends.backend import Backend
from regard.backends.cpu import backend as cpu
from regard.backends.tiled import backend as tiled
from regard.backends.triton import backend as triton
from regard.components.summary import Summary

BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "sdpa": sdpa,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}
# The one that serves what no other serves; choosing it warns.
LAST_RESORT = "reference"
# The backend, and its function, that serves calls of q, k, v and a summary alone without a plan: it returns None or nothing
# where it does not.
PLAIN: tuple[str, Callable[[Tensor, Tensor, Tensor, Summary | None], Sequence[Tensor] | None]] = ("cpu", cpu.plain)
# A function that returns True if q, k and v contain neither NaN nor inf, and False if it cannot tell quickly.
are_finite = cpu.are_finite
