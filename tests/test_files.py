"""Files are written completely or not at all, and errors name the cause."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path

import pytest

from regard.files import write_atomically

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("error", "free", "cause"),
    [
        (OSError(28, "No space left on device"), 0, "No space left on device"),
        # As torch reports a full disk; and the same error with space left.
        (RuntimeError("basic_ios::clear: iostream error"), 0, "No space left on device"),
        (RuntimeError("basic_ios::clear: iostream error"), 1 << 30, "basic_ios::clear: iostream error"),
        (RuntimeError(), 1 << 30, "RuntimeError"),
    ],
)
def test_errors_name_the_file_and_the_cause(
    error: Exception, free: int, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("the one before")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, free))

    def write(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match=re.escape(f"{path}: cannot be written ({cause})")):
        write_atomically(path, write)
    assert path.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [path]
