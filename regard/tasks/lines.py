"""Reading of text files line by line. Errors name the file, the line and the cause."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The first bytes of files that are no UTF-8 text. The mark of UTF-32 starts with that of UTF-16, and comes first.
_SIGNATURES = {
    codecs.BOM_UTF32_LE: "is UTF-32; save the file as UTF-8",
    codecs.BOM_UTF32_BE: "is UTF-32; save the file as UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16; save the file as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; save the file as UTF-8",
    b"\x1f\x8b": "is a gzip file; expected a text file, or a name that ends in .gz",
    b"PK\x03\x04": "is a zip file (as .xlsx files are); expected a text file in UTF-8",
}


class Location(NamedTuple):
    """The file and line of an example."""

    file: Path
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class DataError(ValueError):
    """A file has invalid contents; the message says where and why."""


def read_lines(path: Path) -> Iterator[tuple[Location, str]]:
    r"""Yield the lines of a UTF-8 file and their locations. The file is gzipped if its name ends in .gz.

    Lines end in LF or CRLF. Other line separators of Unicode are part of the line, since they occur within sentences.

    Raises:
        DataError: the file cannot be read, is empty, is no UTF-8 text, or has NUL bytes or other line ends.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "reviews.tsv"
    ...     _ = path.write_bytes(b"a good film\t+\r\na bad film\t-\r\n")
    ...     [(place.line, line) for place, line in read_lines(path)]
    [(1, 'a good film\t+'), (2, 'a bad film\t-')]
    """
    raw = _read_bytes(path)
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        place = Location(path, number)
        # Files that were joined have a byte order mark at the start of each part.
        line = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r")
        if b"\0" in line:
            raise DataError(f"{place}: byte {line.index(0) + 1} is NUL; expected text in UTF-8")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1}, 0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8"
            ) from error
        if "\r" in text:
            raise DataError(
                f"{place}: has carriage returns (CR) without line feeds; save the file with LF or CRLF line ends"
            )
        yield place, text


def _read_bytes(path: Path) -> bytes:
    """Return the contents of a file without compression and byte order mark."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a complete gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    for signature, cause in _SIGNATURES.items():
        if raw.startswith(signature):
            raise DataError(f"{path}: {cause}")
    # UTF-16 without a byte order mark: one byte of each Latin letter is NUL.
    start = raw[:1000]
    if len(start) > 1 and max(start[::2].count(0), start[1::2].count(0)) > len(start) // 4:
        raise DataError(f"{path}: {_SIGNATURES[codecs.BOM_UTF16_LE]}")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    return raw
