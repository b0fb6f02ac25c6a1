"""How large the tiles are, and how many warps and stages share them, by architecture and width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from triton import knobs


@dataclass(frozen=True)
class Shape:
    """The tiles of a kernel: queries by keys; warps that share one; tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 3


# By (architecture, kernel), for the widths up to those given, in half precision. What is not here has the default.
_SHAPES: dict[tuple[tuple[int, int], str], dict[int, Shape]] = {
    ((9, 0), "forward"): {64: Shape(128, 128, 8, 2), 128: Shape(128, 64, 8, 3), 256: Shape(64, 64, 4, 2)},
    ((9, 0), "backward"): {64: Shape(64, 64, 4, 3), 128: Shape(64, 64, 8, 2), 256: Shape(32, 32, 4, 2)},
    ((8, 0), "forward"): {64: Shape(128, 64, 4, 3), 128: Shape(64, 64, 4, 3), 256: Shape(64, 32, 4, 2)},
    ((8, 0), "backward"): {64: Shape(64, 64, 4, 2), 128: Shape(32, 64, 4, 2), 256: Shape(32, 32, 4, 1)},
}
_DEFAULT = {64: Shape(64, 64, 4, 2), 128: Shape(64, 32, 4, 2), 256: Shape(32, 32, 4, 1)}
# The largest weights stand in registers beside the scores.
_TOP = {64: Shape(64, 64, 4, 1), 128: Shape(64, 64, 4, 1), 256: Shape(32, 32, 4, 1)}
# Additive scores fill the registers by fours of fractions, and their gradients by rows.
_ADDITIVE = {"forward": Shape(64, 64, 4, 1), "backward": Shape(32, 32, 4, 1)}
# Few queries: the keys are split among the programs.
_FEW = {256: Shape(16, 64, 4, 3)}
_FEW_SINGLE = {64: Shape(16, 64, 4, 3), 128: Shape(16, 64, 8, 2), 256: Shape(16, 16, 4, 3)}
# Products of float32 run on no matrix unit, and fill the registers.
_SINGLE = {64: Shape(64, 32, 4, 2), 128: Shape(32, 32, 4, 2), 256: Shape(32, 16, 4, 1)}
_WIDEST = Shape(16, 16, 4, 1)
_FEWEST = 16
# Shared memory that a program may take, in bytes; elsewhere that of the GPUs with the least.
_SHARED = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_LEAST_SHARED = 99 << 10
# Under the interpreter each tile is a round of Python: small ones for small problems, and not square, so that no axis is
# mistaken for another.
_INTERPRETED = Shape(32, 64)
# Programs that fill a GPU, and those of the interpreter, which has only one to run them.
_PROGRAMS_A_PROCESSOR, _PROGRAMS_INTERPRETED = 2, 12


def is_interpreted() -> bool:
    """Do kernels run on the CPU, by Triton's interpreter? TRITON_INTERPRET=1 says so, before triton is imported."""
    return bool(knobs.runtime.interpret)


def shape(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Shape:
    """The tiles of a kernel for queries of such a type and rows so wide: "forward", or "few" where there are few queries, or
    "top" with the largest weights; "backward", or "biased backward" with a tensor as a bias; "gather" for the gradients of a
    bias; and these after "additive".
    """
    family, _, pass_ = kernel.rpartition(" ")
    if pass_ == "gather":
        # Along a diagonal of squares the distances are the same.
        found = shape(kernel.replace(pass_, "backward"), dtype, width, device)
        side = min(found.queries, found.keys)
        return replace(found, queries=side, keys=side)
    if family == "biased":
        # What is loaded ahead of a matrix of queries by keys fills the registers: five in six of what is spilled.
        return replace(shape(pass_, dtype, width, device), stages=1)
    if is_interpreted():
        return _INTERPRETED
    architecture, size = _architecture(device), width * dtype.itemsize
    single = dtype.itemsize != 2
    if family:
        found = _ADDITIVE[pass_]
    else:
        if kernel == "few":
            table = _FEW_SINGLE if single else _FEW
        elif single:
            table = _SINGLE
        else:
            table = _TOP if kernel == "top" else _SHAPES.get((architecture, kernel), _DEFAULT)
        found = next((shape for most, shape in table.items() if width <= most), _WIDEST)
    return fitting(found, size, _SHARED.get(architecture, _LEAST_SHARED))


def fitting(shape: Shape, row: int, shared: int) -> Shape:
    """The tiles with fewer stages, and then fewer keys, until they fit the shared memory; `row` is the bytes of a row."""
    while _taken(shape, row) > shared and (shape.stages > 1 or shape.keys > _FEWEST):
        fewer = {"stages": shape.stages - 1} if shape.stages > 1 else {"keys": shape.keys // 2}
        shape = replace(shape, **fewer)
    return shape


def _taken(shape: Shape, row: int) -> int:
    """About how much shared memory a program takes: keys and values ahead, the queries, scores and a bias."""
    return (2 * shape.keys * shape.stages + shape.queries) * row + 6 * shape.queries * shape.keys


def programs(device: torch.device) -> int:
    """How many programs fill a GPU."""
    if is_interpreted():
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _architecture(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
