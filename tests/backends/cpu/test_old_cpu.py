"""The native kernels on a CPU without AVX: environment variables choose another code path, but trap no illegal instruction."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

_CODE = """
import math, torch
torch.ops.load_library("regard/_native.abi3.so")
print(torch.ops.regard_native.instructions())
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
expected = torch.softmax(q.double() @ k.double().mT / math.sqrt(8), -1) @ v.double()
print(float((torch.ops.regard_native.plain(q, k, v, 0, 0)[0] - expected).abs().max()))
"""


@pytest.mark.slow
def test_baseline_kernels_run_on_a_cpu_without_avx() -> None:
    """An emulated Nehalem (SSE4.2) finds the baseline kernels alone, and they compute the right result."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.fail("no qemu-x86_64 on the path: install qemu-user")
    done = subprocess.run(
        [qemu, "-cpu", "Nehalem", sys.executable, "-c", _CODE], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    instructions, error = done.stdout.splitlines()
    assert instructions == "baseline"
    # Sums of 8 and of 5 terms of size 1.
    assert float(error) <= 13 * 2**-24
