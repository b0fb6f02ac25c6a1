"""Writing files: complete or not at all, and readable by whom new files are readable."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from regard.error_text import first_line

# Writers of torch and safetensors name no cause on a full disk: then less than this is free, in bytes.
_FULL = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, and rename it when it is complete. It gets the permissions of a new file.

    Raises:
        OSError: it cannot be written; the message names the file and the cause.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "notes.txt"
    ...     write_atomically(path, lambda part: part.write_text("attention"))
    ...     path.read_text(), [x.name for x in Path(folder).iterdir()]
    ('attention', ['notes.txt'])
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode & 0o777
        write(part)
        # safetensors makes files that only their owner can read.
        part.chmod(mode)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # Full disks, as torch and safetensors report them.
        if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: cannot be written ({_cause(error, path)})") from error
        raise


def _cause(error: BaseException, path: Path) -> str:
    """Return why a file could not be written."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.parent.is_dir() and shutil.disk_usage(path.parent).free < _FULL:
        return os.strerror(errno.ENOSPC)
    return first_line(error)
