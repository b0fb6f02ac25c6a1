"""Writing files: complete or not at all, and readable by whom new files are readable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


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
            cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise OSError(f"{path}: cannot be written ({cause})") from error
        raise
