"""Runs the command line in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from support.paths import ROOT


def run(
    *arguments: str, expect: int = 0, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "regard.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        input=stdin,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done
