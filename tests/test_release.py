"""What a release consists of: the source distribution builds a wheel, which runs the native kernels where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from support.paths import ROOT


def _run(*arguments: object, cwd: Path = ROOT) -> str:
    # What is installed runs, not what the environment adds.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder)
    (path,) = folder.glob("regard-*.tar.gz")
    return path


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("regard", "csrc", "tests")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".cpp", ".h", ".html", ".css", ".js", ".typed")
    }
    assert len([name for name in expected if name.startswith("csrc/")]) >= 26
    assert sorted(expected - names) == []
    assert [name for name in names if name.endswith((".so", ".o", "_native.txt"))] == []


@pytest.mark.slow
def test_sdist_builds_a_wheel_with_native_kernels(sdist: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist)
    (wheel,) = tmp_path.glob("regard-*.whl")
    assert "abi3" in wheel.name
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    (python,) = (tmp_path / "venv").glob("*/python")
    # torch is found where this process has it: hooks of editable installs there are not run.
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    code = (
        "import torch, regard; from regard.backends.cpu import extension; q = torch.randn(1, 2, 7, 8);"
        "out = regard.attention(q, q, q, score=regard.score.Additive(torch.ones(8)), backend='cpu');"
        "print(regard.__file__, extension.missing, bool(out.isfinite().all()), *extension.instructions())"
    )
    where, missing, finite, *instructions = _run(python, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert (missing, finite) == ("None", "True")
    assert "baseline" in instructions
