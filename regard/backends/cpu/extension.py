"""The library of native kernels: whether it is there, and if not, why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parents[2]


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


def are_finite(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True only if there is neither NaN nor inf in them, and that is cheap to find out."""
    # Who looks at operators as they run may want a graph of them that is good for other numbers, too.
    watched = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    if missing or watched or not q.is_cpu:
        return False
    try:
        return bool(ops.finite.default(q, k, v))
    except RuntimeError:  # inside torch.func.vmap no number can be read
        return False


# ---------------------------------------------------------------------------------------------------------------------
# What the operators give, told without computing it: for graphs that hold them, and what else runs on tensors without
# numbers. The words in the middle make no difference.


def _forward(q: Tensor, k: Tensor, v: Tensor, *words: Any) -> list[Tensor]:
    top, member, numbers, wanted = words[-4:]
    rows, E, S = q.shape[:3], v.shape[-1], k.shape[2]
    # With bit 8 nothing is kept for what may follow.
    kept = ((0,), (0,)) if wanted & 8 else ((2, *rows), (*rows, E))
    results = [q.new_empty((*rows, E), dtype=v.dtype)]
    results += [q.new_empty(shape, dtype=torch.float32) for shape in kept[: 1 + (v.dtype != torch.float32)]]
    results += [q.new_empty(rows, dtype=torch.float32) for bit in (1, 2, 4) if wanted & bit]
    if top:
        results += [q.new_empty((*rows, top), dtype=dtype) for dtype in (torch.float32, torch.int64)]
    shapes = [shape for bit, shape in ((16, (*rows[:2], S)), (32, (*rows, S))) if wanted & bit]
    if numbers:
        shapes.append((*rows[:2], len(numbers), S))
    if member is not None:
        shapes.append((*rows, member.shape[1]))
    return [*results, *[q.new_empty(shape, dtype=torch.float32) for shape in shapes]]


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype or q.dtype == torch.float64:
        return None
    (B, H, L, D), (G, S), E = q.shape, k.shape[1:3], v.shape[-1]
    fit = k.shape == (B, G, S, D) and v.shape == (B, G, S, E) and all((B, G, L, S, D, E)) and not H % G
    return q.new_empty(B, H, L, E) if fit and all(x.stride(3) == 1 for x in (q, k, v)) else None


def _backward(
    out: Tensor, dout: Tensor, stats: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    weight: Tensor | None, key_bias: Tensor | None, query_bias: Tensor | None, bias: Tensor | None, *words: Any,
) -> list[Tensor]:  # fmt: skip
    wanted = words[-1]
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    results = [x.new_empty(x.shape if wanted & bit else (0,)) for bit, x in ((1, q), (2, k), (4, v))]
    shapes = [(8, (B, G, S)), (16, (B, H, L)), (32, () if bias is None else bias.shape)]
    results += [q.new_empty(shape, dtype=torch.float32) for bit, shape in shapes if wanted & bit]
    if wanted & 64:
        results.append(q.new_empty((H, L + S - 1 + 64), dtype=torch.float64))
    if wanted & 128:
        results.append(q.new_empty((B, H, L), dtype=torch.float32))
    if wanted & 256:
        results.append(q.new_empty((H, q.shape[3]), dtype=torch.float64))
    return results


def _backward_told(
    out: Tensor, dout: Tensor, stats: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor],
    there: int, *told: Any,
) -> list[Tensor]:  # fmt: skip
    words = iter(tensors)
    first = [next(words) if there >> i & 1 else None for i in range(4)]
    return _backward(out, dout, stats, dlse, q, k, v, *first, told[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "plain": _plain,
    "backward": _backward,
    "forward_told": _forward,
    "backward_told": _backward_told,
}
if not missing:
    _library: Any = torch.library.Library("regard_native", "IMPL")  # type: ignore[no-untyped-call]
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"regard_native::{_name}", _fake)
        # They have no derivative: autograd, of which regard/backends/autograd.py takes care, need not look at them.
        _library.impl(_name, torch.library.fallthrough_kernel, "AutogradCPU")
