"""The library of native kernels: loading it, its operators, and the fakes of these for compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.components.statistic import BUILT_IN, Statistic

_FOLDER = Path(__file__).parents[2]


def _load() -> str | None:
    library = _FOLDER / "_native.abi3.so"
    if not library.exists():
        note = _FOLDER / "_native.txt"
        reason = note.read_text().strip() if note.exists() else "this installation was not built on this machine"
        return f"native kernels unavailable ({reason}): install a C++ compiler (g++) and reinstall regard"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        torch.ops.regard_native.instructions()
    except Exception as error:
        return f"cannot load the native kernels ({str(error.__cause__ or error).splitlines()[0]})"
    return None


# Why the native kernels are unavailable; None if they are available.
missing = _load()
ops: Any = torch.ops.regard_native


def instructions() -> list[str]:
    """Return the instruction sets that this machine supports, the one in use first.

    The environment variable REGARD_INSTRUCTIONS selects another default.
    """
    return [] if missing else str(ops.instructions()).split()


def names(table: str) -> list[str]:
    """Return the names of "masks", "normalizers" or "summaries" in csrc/problem.h, in the order of their numbers."""
    return [] if missing else str(ops.names(table)).split()


# ---------------------------------------------------------------------------------------------------------------------
# Fakes of the operators: the shapes and dtypes of their results, for compiled graphs and fake tensors.


# The statistics that the forward operator returns, in order.
STATISTICS: dict[str, type[Statistic]] = {
    name: kind for name in names("summaries") for kind in BUILT_IN if kind.name == name
}


def request(statistics: Collection[str], is_last: bool) -> int:
    """Return the bits that request statistics by name, and a forward pass without a backward pass."""
    return int(is_last) + sum(2 << bit for bit, name in enumerate(STATISTICS) if name in statistics)


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> list[Tensor]:
    top, member, row_indices, requested = arguments[-4:]
    rows = q.shape[:3]
    sizes = {"B": q.shape[0], "H": q.shape[1], "L": q.shape[2], "S": k.shape[2], "K": top, "R": len(row_indices)}
    sizes["N"] = 0 if member is None else member.shape[1]
    saved = ((0,), (0,)) if requested & request((), is_last=True) else ((2, *rows), (*rows, v.shape[-1]))
    results = [q.new_empty((*rows, v.shape[-1]), dtype=v.dtype)]
    results += [q.new_empty(shape, dtype=torch.float32) for shape in saved[: 1 + (v.dtype != torch.float32)]]
    for name, kind in STATISTICS.items():
        if requested & request((name,), is_last=False):
            shape = [sizes[axis] for axis in kind.axes]
            results.append(q.new_empty(shape, dtype=kind.dtype or torch.float32))
    return results


def _plain(q: Tensor, k: Tensor, v: Tensor, top: int, requested: int) -> list[Tensor]:
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype or q.dtype == torch.float64:
        return []
    (B, H, L, D), (G, S), E = q.shape, k.shape[1:3], v.shape[-1]
    fit = k.shape == (B, G, S, D) and v.shape == (B, G, S, E) and all((B, G, L, S, D, E)) and not H % G
    if not fit or any(x.stride(3) != 1 for x in (q, k, v)):
        return []
    out, _, *rest = _forward(q, k, v, top, None, [], requested | request((), is_last=True))
    return [out, *rest[v.dtype != torch.float32 :]]


def _backward(
    out: Tensor, dout: Tensor, stats: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor],
    present_mask: int, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    requested = arguments[-1]
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    # The bias is the fourth of the optional tensors.
    bias = tensors[(present_mask & 7).bit_count()] if present_mask & 8 else None
    results = [x.new_empty(x.shape if requested & bit else (0,)) for bit, x in ((1, q), (2, k), (4, v))]
    shapes = [(8, (B, G, S)), (16, (B, H, L)), (32, () if bias is None else bias.shape)]
    results += [q.new_empty(shape, dtype=torch.float32) for bit, shape in shapes if requested & bit]
    if requested & 64:
        results.append(q.new_empty((H, L + S - 1 + 64), dtype=torch.float64))
    if requested & 128:
        results.append(q.new_empty((B, H, L), dtype=torch.float32))
    if requested & 256:
        results.append(q.new_empty((H, q.shape[3]), dtype=torch.float64))
    return results


_FAKES: dict[str, Callable[..., Any]] = {"forward": _forward, "plain": _plain, "backward": _backward}
if not missing:
    _library: Any = torch.library.Library("regard_native", "IMPL")  # type: ignore[no-untyped-call]
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"regard_native::{_name}", _fake)
        # The operators have no derivatives of their own; regard/backends/autograd.py defines them.
        _library.impl(_name, torch.library.fallthrough_kernel, "AutogradCPU")
