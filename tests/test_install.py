"""The package as it is installed: with a compiler, one wheel for every Python; without, all but the native kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

_USE = """
import torch, regard
from regard.apps import doctor
with regard.record_backends() as ran:
    regard.attention(*[torch.ones(1, 2, 3, 4)] * 3, softcap=2.0)
print(regard.__file__, ran, next(x.value for x in doctor.machine() if x.name == "native kernels"), sep="\\n")
"""


def _installed(folder: Path, **environment: str) -> tuple[Path, list[str]]:
    """A wheel that pip makes of a clean copy of the sources, and what a process says that uses it."""
    copy, wheels, site = folder / "sources", folder / "wheels", folder / "site"
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "_native.*", "__pycache__", "node_modules")
    shutil.copytree(ROOT, copy, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environ = {**os.environ, **environment}
    making = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(copy)]
    subprocess.run(making, env=environ, check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _USE], capture_output=True, text=True, check=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    file, ran, native = done.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    return wheel, [ran, native]


@pytest.mark.slow
def test_a_wheel(tmp_path: Path) -> None:
    wheel, (ran, native) = _installed(tmp_path)
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    names = zipfile.ZipFile(wheel).namelist()
    assert "regard/_native.abi3.so" in names and "regard/_native.txt" not in names
    assert ran == "['cpu']" and "baseline" in native


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    nowhere = {"CC": "/nonexistent", "CXX": "/nonexistent", "PATH": str(Path(sys.executable).parent)}
    wheel, (ran, native) = _installed(tmp_path, **nowhere)
    assert "regard/_native.abi3.so" not in zipfile.ZipFile(wheel).namelist()
    assert ran == "['tiled']" and "CompileError" in native and "install a C++ compiler" in native
