"""The backends, in the order of preference: the one table that names them."""

from __future__ import annotations

from regard.backends import reference, sdpa
from regard.backends.backend import Backend
from regard.backends.cpu import backend as cpu
from regard.backends.tiled import backend as tiled
from regard.backends.triton import backend as triton

BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "sdpa": sdpa,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}
# The one that serves what no other serves; choosing it warns.
LAST_RESORT = "reference"
