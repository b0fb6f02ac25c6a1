"""Random problems on native libraries built with sanitizers: no invalid memory access, undefined behavior or data race."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

# Disjoint ranges of random problems, and the runtimes to preload.
_PROBLEMS = {"address": range(12_000), "thread": range(12_000, 20_000)}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
_OPTIONS = {
    # Python itself leaks at exit; tests/backends/test_memory.py checks for leaks of the kernels.
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@pytest.fixture(scope="module", params=_PROBLEMS)
def sanitizer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def package(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a copy of the package with a sanitized library, as in CONTRIBUTING.md."""
    base = tmp_path_factory.mktemp(sanitizer)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", base, "--build-lib", base / "package"],
        cwd=ROOT, env={**os.environ, "REGARD_SANITIZE": sanitizer}, check=True,
    )  # fmt: skip
    return base / "package"


def _run(sanitizer: str, package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in _RUNTIMES[sanitizer]
    ]
    path = os.pathsep.join(map(str, (package, TESTS)))
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=package,
        env={**os.environ, **_OPTIONS, "PYTHONPATH": path, "LD_PRELOAD": " ".join(runtimes)},
    )  # fmt: skip


_OPERATOR = """
import ctypes, threading
import numpy, torch
from regard.backends.cpu import extension
from support.cpu import packed_arguments, requested

def forward(q, sink=None):
    return extension.ops.forward(*packed_arguments(q, q, q, sink=sink, allow_bf16_dot=False), *requested())

"""
# Errors of the caller that only a sanitized library detects.
_FAULTS = {
    "address": {
        "heap-buffer-overflow": """
short = numpy.ones(5000, numpy.float32)
forward(torch.from_numpy(numpy.lib.stride_tricks.as_strided(short, (1, 1, 5001, 1), (4, 4, 4, 4))))
""",
        "misaligned address": """
forward(torch.ones(1, 3, 5, 2), torch.frombuffer(bytearray(13), dtype=torch.float32, count=3, offset=1))
""",
    },
    "thread": {
        "data race": """
q = torch.ones(1, 3, 100, 16)
reader = threading.Thread(target=lambda: [forward(q) for _ in range(200)])
reader.start()
while reader.is_alive():
    ctypes.memset(q.data_ptr(), 0, 4 * q.numel())
""",
    },
}


@pytest.mark.slow
def test_sanitizer_detects_faults(sanitizer: str, package: Path) -> None:
    """The absence of reports is only meaningful if faults are reported."""
    done = _run(sanitizer, package, "-c", _OPERATOR + "forward(torch.ones(1, 3, 100, 16), torch.ones(3))")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for fault, code in _FAULTS[sanitizer].items():
        done = _run(sanitizer, package, "-c", _OPERATOR + code)
        assert done.returncode != 0 and fault in done.stderr, done.stderr[-4000:]


@pytest.mark.slow
def test_random_problems_without_reports(sanitizer: str, package: Path) -> None:
    """20,000 problems over all instruction sets: no reports, and all results agree with the reference."""
    problems, processes = _PROBLEMS[sanitizer], os.cpu_count() or 1
    shares = [problems[i * len(problems) // processes : (i + 1) * len(problems) // processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        runs = pool.map(
            lambda share: _run(sanitizer, package, TESTS / "support" / "fuzz.py", len(share), share.start), shares
        )
        for share, done in zip(shares, runs, strict=True):
            assert done.returncode == 0, done.stderr[-8000:]
            assert (
                done.stdout == f"{len(share)} problems by {package / 'regard' / 'backends' / 'cpu' / 'extension.py'}\n"
            )
