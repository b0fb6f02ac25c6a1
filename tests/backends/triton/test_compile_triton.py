"""The kernels of the GPU compile for GPUs, of which there is none here: what the interpreter cannot tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import compile_triton


def _compile(architecture: int, *names: str) -> dict[str, list[dict[str, Any]]]:
    """What each case was compiled to."""
    command = [sys.executable, str(Path(compile_triton.__file__)), str(architecture), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        if "case" in line:
            kernels = found.setdefault(line["case"], [])
        else:
            kernels.append(line)
    return found


def test_the_plain_kernels_run_on_the_matrix_units() -> None:
    (kernels,) = _compile(90, "causal").values()
    assert [kernel["kernel"] for kernel in kernels] == ["forward", "pull_queries", "pull_keys"]
    for kernel in kernels:
        # Few bytes that are spilled once, before the loops or after them, cost nothing.
        assert kernel["products"] >= 16 and not kernel["spills in loops"] and kernel["spilled"] <= 16, kernel


def test_additive_scores_take_no_tanh_each() -> None:
    """A thread of the forward kernel has 32 numbers of a tile: the powers are those of the weights and of the long way, twice,
    and not one more for each of the 64 columns.
    """
    forward, *_ = _compile(90, "additive, causal")["additive, causal"]
    assert forward["powers"] < 6 * 32 and not forward["spilled"], forward


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_all_kernels_compile(architecture: int) -> None:
    found = _compile(architecture)
    assert list(found) == list(compile_triton.CASES)
    assert all(found.values())
    limit = {80: 163, 90: 227, 100: 227}.get(architecture, 99) << 10
    assert [(name, x) for name, kernels in found.items() for x in kernels if x["shared"] > limit] == []
