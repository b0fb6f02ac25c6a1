"""Lines of text files, or an error with the location and the cause."""

from __future__ import annotations

import codecs
import gzip
import re
from pathlib import Path

import pytest

from regard.tasks.lines import DataError, read_lines


def lines_of(path: Path, content: bytes) -> list[tuple[int, str]]:
    path.write_bytes(content)
    return [(place.line, line) for place, line in read_lines(path)]


def test_lines_end_in_line_feeds(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert lines_of(path, b"a\nb\r\n\nc") == [(1, "a"), (2, "b"), (3, ""), (4, "c")]
    # Other separators of Unicode are within a line.
    assert lines_of(path, "a\u2028b\x0bc\x85\n".encode()) == [(1, "a\u2028b\x0bc\x85")]
    # Files that were joined have a mark at the start of each.
    assert lines_of(path, codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"b\n") == [(1, "a"), (2, "b")]
    assert lines_of(tmp_path / "a.gz", gzip.compress(b"a\nb\n")) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b" \n\n", "a.tsv: is empty"),
        (codecs.BOM_UTF8 + b"\n", "a.tsv: is empty"),
        ("a\tb\nsch\xf6n\tc\n".encode("latin-1"), "a.tsv, line 2: byte 4, 0xf6, is not UTF-8; save the file as UTF-8"),
        (b"a\tb\rc\td\r", "a.tsv, line 1: has carriage returns (CR) without line feeds; save the file with LF or CRLF line ends"),
        (b"a\tb\nc\rx\td\n", "a.tsv, line 2: has carriage returns (CR) without line feeds; save the file with LF or CRLF line ends"),
        (b"a\tb\nc\0\td\n", "a.tsv, line 2: byte 2 is NUL; expected text in UTF-8"),
        ("a film\t+\n".encode("utf-16"), "a.tsv: is UTF-16; save the file as UTF-8"),
        ("a film\t+\n".encode("utf-16-le"), "a.tsv: is UTF-16; save the file as UTF-8"),
        ("a film\t+\n".encode("utf-16-be"), "a.tsv: is UTF-16; save the file as UTF-8"),
        ("a film\t+\n".encode("utf-32"), "a.tsv: is UTF-32; save the file as UTF-8"),
        (gzip.compress(b"a\tb\n", mtime=0), "a.tsv: is a gzip file; expected a text file, or a name that ends in .gz"),
        (b"PK\x03\x04...", "a.tsv: is a zip file (as .xlsx files are); expected a text file in UTF-8"),
    ],
)  # fmt: skip
def test_errors_name_line_and_cause(tmp_path: Path, content: bytes, error: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(f'{tmp_path}/{error}')}$"):
        lines_of(tmp_path / "a.tsv", content)


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: cannot be read \(No such file or directory\)$"):
        list(read_lines(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"a\.gz: is not a complete gzip file \(Not a gzipped file"):
        lines_of(tmp_path / "a.gz", b"a\tb\n")
    with pytest.raises(DataError, match=r"a\.gz: is not a complete gzip file \("):
        lines_of(tmp_path / "a.gz", gzip.compress(b"a\tb\n" * 99)[:-9])
