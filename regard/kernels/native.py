"""The library of native kernels: whether it is there, and if not, why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent.parent


def _load() -> str | None:
    library = _FOLDER / "_native.abi3.so"
    if not library.exists():
        note = _FOLDER / "_native.txt"
        reason = note.read_text().strip() if note.exists() else "this installation was not built on this machine"
        return f"the native kernels are not there ({reason}); install a C++ compiler (g++), then regard once more"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        torch.ops.regard_native.instructions()
    except Exception as error:
        return f"the native kernels cannot be loaded ({str(error.__cause__ or error).splitlines()[0]})"
    return None


# Why there are no native kernels; None if there are.
missing = _load()
ops: Any = torch.ops.regard_native


def instructions() -> list[str]:
    """The instruction sets that this machine runs, the one in use first; REGARD_INSTRUCTIONS names another."""
    return [] if missing else str(ops.instructions()).split()
