"""Runs the command line: in this process, where importing torch takes no time again, or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from support.paths import ROOT

from regard.cli import main


def run(*arguments: str, expect: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in this process, in the root of the project."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), _redirect_stdin(stdin), _in_root(), warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            main(list(arguments))
        except SystemExit as done:
            code = int(done.code or 0)
    return _checked(subprocess.CompletedProcess([*arguments], code, out.getvalue(), err.getvalue()), expect)


def run_process(
    *arguments: str, expect: int = 0, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "regard.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        input=stdin,
        env={**os.environ, **(environment or {})},
    )
    return _checked(done, expect)


def _checked(done: subprocess.CompletedProcess[str], expect: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@contextmanager
def _redirect_stdin(text: str) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO(text)
    yield
    sys.stdin = before


@contextmanager
def _in_root() -> Iterator[None]:
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)
