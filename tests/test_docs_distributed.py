"""The script in docs/distributed.md runs on two processes, and its second example in one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)


def test_script_runs_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(BLOCKS[0], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [f"SequenceShards(10000, even, rank {rank} of 2: 5000, 5000)" for rank in range(2)]
    assert sorted(done.stdout.splitlines()) == lines


def test_layout_of_threads_is_balanced() -> None:
    code = "from regard import mask\nfrom regard.distributed import SequenceShards\n" + BLOCKS[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(1.0 <= x < 1.05 for x in eval(done.stdout))
