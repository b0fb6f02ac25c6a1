"""Tile sizes, warps and pipeline stages of the kernels, by architecture and width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from triton import knobs


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of queries and keys per tile, warps per program, and tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 3


# By (architecture, kernel): configurations in half precision for widths up to the key. Others use _DEFAULT.
_CONFIGS: dict[tuple[tuple[int, int], str], dict[int, LaunchConfig]] = {
    ((9, 0), "forward"): {
        64: LaunchConfig(128, 128, 8, 2),
        128: LaunchConfig(128, 64, 8, 3),
        256: LaunchConfig(64, 64, 4, 2),
    },
    ((9, 0), "backward"): {
        64: LaunchConfig(64, 64, 4, 3),
        128: LaunchConfig(64, 64, 8, 2),
        256: LaunchConfig(32, 32, 4, 2),
    },
    ((8, 0), "forward"): {
        64: LaunchConfig(128, 64, 4, 3),
        128: LaunchConfig(64, 64, 4, 3),
        256: LaunchConfig(64, 32, 4, 2),
    },
    ((8, 0), "backward"): {
        64: LaunchConfig(64, 64, 4, 2),
        128: LaunchConfig(32, 64, 4, 2),
        256: LaunchConfig(32, 32, 4, 1),
    },
}
_DEFAULT = {64: LaunchConfig(64, 64, 4, 2), 128: LaunchConfig(64, 32, 4, 2), 256: LaunchConfig(32, 32, 4, 1)}
# The largest weights take registers besides the scores.
_TOP = {64: LaunchConfig(64, 64, 4, 1), 128: LaunchConfig(64, 64, 4, 1), 256: LaunchConfig(32, 32, 4, 1)}
# Additive scores fill the registers with four fractions per element, their gradients with whole rows.
_ADDITIVE = {"forward": LaunchConfig(64, 64, 4, 1), "backward": LaunchConfig(32, 32, 4, 1)}
# Few queries: the keys are split among programs.
_FEW = {256: LaunchConfig(16, 64, 4, 3)}
_FEW_FLOAT32 = {64: LaunchConfig(16, 64, 4, 3), 128: LaunchConfig(16, 64, 8, 2), 256: LaunchConfig(16, 16, 4, 3)}
# float32 products do not run on the matrix units, and fill the registers.
_FLOAT32 = {64: LaunchConfig(64, 32, 4, 2), 128: LaunchConfig(32, 32, 4, 2), 256: LaunchConfig(32, 16, 4, 1)}
_FALLBACK = LaunchConfig(16, 16, 4, 1)
_MIN_KEYS = 16
# Shared memory per program in bytes, by architecture; the smallest of all GPUs for the others.
_SHARED_MEMORY = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_MIN_SHARED_MEMORY = 99 << 10
# In the interpreter each tile costs Python time: small problems need small tiles. They are not square, so that no test
# passes with queries and keys exchanged.
_INTERPRETED = LaunchConfig(32, 64)
# Programs that fill a GPU, per multiprocessor; in the interpreter, enough for tests to split the keys.
_PROGRAMS_PER_MULTIPROCESSOR, _PROGRAMS_INTERPRETED = 2, 12


def is_interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter. Triton reads TRITON_INTERPRET=1 when it is imported."""
    return bool(knobs.runtime.interpret)


def launch_config(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> LaunchConfig:
    """Return the launch configuration of a kernel.

    Args:
        kernel: "forward", "few" (few queries), "top" (with the largest weights), "backward", "biased backward" (with a
            tensor as bias) or "bias_grad"; with additive scores, one of "additive forward", "additive backward" and
            "additive bias_grad".
        dtype: of the queries.
        width: of the tiles.
    """
    family, _, pass_ = kernel.rpartition(" ")
    if pass_ == "bias_grad":
        # Only square tiles hold the same distances along a diagonal.
        config = launch_config(kernel.replace(pass_, "backward"), dtype, width, device)
        side = min(config.queries, config.keys)
        return replace(config, queries=side, keys=side)
    if family == "biased":
        # Loading tiles of a bias ahead fills the registers: it causes five sixths of the spills.
        return replace(launch_config(pass_, dtype, width, device), stages=1)
    if is_interpreted():
        return _INTERPRETED
    architecture, row_bytes = _architecture(device), width * dtype.itemsize
    is_float32 = dtype.itemsize != 2
    if family:
        config = _ADDITIVE[pass_]
    else:
        if kernel == "few":
            table = _FEW_FLOAT32 if is_float32 else _FEW
        elif is_float32:
            table = _FLOAT32
        else:
            table = _TOP if kernel == "top" else _CONFIGS.get((architecture, kernel), _DEFAULT)
        config = next((config for max_width, config in table.items() if width <= max_width), _FALLBACK)
    return fit_shared_memory(config, row_bytes, _SHARED_MEMORY.get(architecture, _MIN_SHARED_MEMORY))


def fit_shared_memory(config: LaunchConfig, row_bytes: int, limit: int) -> LaunchConfig:
    """Reduce the stages, and then the keys per tile, until a program fits into `limit` bytes of shared memory.

    >>> from regard.backends.triton.tuning import LaunchConfig, fit_shared_memory
    >>> fit_shared_memory(LaunchConfig(64, 64, warps=4, stages=2), row_bytes=512, limit=99 << 10)
    LaunchConfig(queries=64, keys=32, warps=4, stages=1)
    """
    while _shared_memory(config, row_bytes) > limit and (config.stages > 1 or config.keys > _MIN_KEYS):
        fewer = {"stages": config.stages - 1} if config.stages > 1 else {"keys": config.keys // 2}
        config = replace(config, **fewer)
    return config


def _shared_memory(config: LaunchConfig, row_bytes: int) -> int:
    """Estimate the bytes of shared memory per program: keys and values loaded ahead, queries, scores and a bias."""
    return (2 * config.keys * config.stages + config.queries) * row_bytes + 6 * config.queries * config.keys


def max_programs(device: torch.device) -> int:
    """Return the number of programs that fill a GPU."""
    if is_interpreted():
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _architecture(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
