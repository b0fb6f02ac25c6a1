"""The Triton kernels compile for GPUs. No GPU is needed: the tests read the machine code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import compile_triton


def _compile(architecture: int, *names: str) -> dict[str, list[dict[str, Any]]]:
    """Return the compiled kernels of each case."""
    command = [sys.executable, str(Path(compile_triton.__file__)), str(architecture), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    cases: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        if "case" in line:
            kernels = cases.setdefault(line["case"], [])
        else:
            kernels.append(line)
    return cases


def test_causal_kernels_use_matrix_units_without_spills_in_loops() -> None:
    (kernels,) = _compile(90, "causal").values()
    assert [kernel["kernel"] for kernel in kernels] == ["fwd_kernel", "bwd_dq_kernel", "bwd_dkv_kernel"]
    for kernel in kernels:
        # A few bytes spilled once, before or after the loops, cost nothing.
        assert kernel["products"] >= 16 and not kernel["spills in loops"] and kernel["spilled"] <= 16, kernel


def test_additive_scores_use_few_exponentials() -> None:
    """Each thread of the forward kernel has 32 elements of a tile. The kernel contains exponentials for the weights and
    for tanh itself, each in the loops over full and partial tiles, but none for each of the 64 columns.
    """
    forward, *_ = _compile(90, "additive, causal")["additive, causal"]
    assert forward["powers"] < 6 * 32 and not forward["spilled"], forward


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_all_kernels_compile_within_shared_memory(architecture: int) -> None:
    cases = _compile(architecture)
    assert list(cases) == list(compile_triton.CASES)
    assert all(cases.values())
    limit = {80: 163, 90: 227, 100: 227}.get(architecture, 99) << 10
    assert [(name, x) for name, kernels in cases.items() for x in kernels if x["shared"] > limit] == []
