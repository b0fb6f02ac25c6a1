"""What the CPU of this machine has."""

from __future__ import annotations

import torch

# Matrix units (AMX), which torch's own operators compute on in bfloat16.
HAS_MATRIX_UNITS = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
