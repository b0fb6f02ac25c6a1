"""Reading of examples from text files. Errors name the file, the line and the cause."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from regard import deprecated

E = TypeVar("E")

# A first line whose last column is one of these is a header.
_HEADERS = ("label", "target")


class Location(NamedTuple):
    """The file and line of an example."""

    file: Path
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class DataError(ValueError):
    """A file has invalid contents; the message says where and why."""


class Pair(NamedTuple):
    """A source sequence and its target sequence."""

    source: str
    target: str
    place: Location


class Tagged(NamedTuple):
    """The words of a sentence, and the tag of each word."""

    words: list[str]
    tags: list[str]
    place: Location


class Labeled(NamedTuple):
    """A text and its label."""

    text: str
    label: str
    place: Location


def read_lines(path: Path) -> Iterator[tuple[Location, str]]:
    """Yield the lines of a UTF-8 file and their locations. The file is gzipped if its name ends in .gz."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a complete gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    # Split at line feeds only: other Unicode line separators occur within sentences.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), 1):
        place = Location(path, number)
        try:
            yield place, line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1}, 0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8"
            ) from error


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Read pairs of sequences from one file with two tab-separated columns, or from two files with parallel lines."""
    if len(paths) == 1:
        rows = _read_columns(paths[0], "source, tab, target")
        return [Pair(source, target, place) for place, source, target in rows]
    if len(paths) != 2:
        raise DataError(f"got {len(paths)} files; expected one with two columns, or two with parallel lines")
    sources, targets = (list(read_lines(path)) for path in paths)
    if len(sources) != len(targets):
        raise DataError(
            f"{paths[0]} has {len(sources)} lines, but {paths[1]} has {len(targets)}; expected equal numbers"
        )
    pairs = []
    for (place, source), (other, target) in zip(sources, targets, strict=True):
        for location, text in ((place, source), (other, target)):
            if not text.strip():
                raise DataError(
                    f"{location}: is empty; expected the counterpart of line {location.line} of the other file"
                )
        pairs.append(Pair(source.strip(), target.strip(), place))
    return pairs


def read_labeled(paths: Sequence[Path]) -> list[Labeled]:
    """Read texts and labels from files with two tab-separated columns."""
    return [
        Labeled(text, label, place) for path in paths for place, text, label in _read_columns(path, "text, tab, label")
    ]


def _read_columns(path: Path, columns: str) -> Iterator[tuple[Location, str, str]]:
    """Yield the lines of a file with two columns. A first line whose second column is "label" or "target" is a header."""
    is_empty = True
    for place, line in read_lines(path):
        parts = [part.strip() for part in line.split("\t")]
        if parts == [""]:
            continue
        if len(parts) != 2:
            raise DataError(f"{place}: has {len(parts)} column{'s' * (len(parts) != 1)}; expected two: {columns}")
        if place.line == 1 and parts[1].lower() in _HEADERS:
            continue
        for part, name in zip(parts, ("first", "second"), strict=True):
            if not part:
                raise DataError(f"{place}: the {name} column is empty; expected {columns}")
        is_empty = False
        yield place, parts[0], parts[1]
    if is_empty:
        raise DataError(f"{path}: has no examples, only a header")


def read_tagged(paths: Sequence[Path]) -> list[Tagged]:
    """Read sentences with universal part-of-speech tags from CoNLL-U files."""
    try:
        import conllu
    except ImportError as error:
        raise ImportError("reading CoNLL-U needs the package conllu: pip install 'regard[tasks]'") from error
    sentences = []
    for path in paths:
        for place, lines in _read_blocks(path):
            try:
                (sentence,) = conllu.parse("\n".join(lines) + "\n\n")
            except (conllu.exceptions.ParseException, ValueError) as error:
                cause = str(error).strip().splitlines()[0] if str(error).strip() else "it has no words"
                raise DataError(f"{place}: the sentence that starts here is not valid CoNLL-U ({cause})") from error
            # IDs that are not integers: ranges of multiword tokens, and empty nodes.
            rows = [row for row in sentence if isinstance(row["id"], int)]
            for row in rows:
                if row.get("upos") in (None, "_"):
                    raise DataError(
                        f"{place}: {row['form']!r}, in the sentence that starts here, has no tag (column 4, UPOS)"
                    )
            if rows:
                sentences.append(Tagged([row["form"] for row in rows], [row["upos"] for row in rows], place))
    return sentences


def _read_blocks(path: Path) -> Iterator[tuple[Location, list[str]]]:
    """Yield the blocks of lines between empty lines, except blocks that consist of comments."""
    block: list[str] = []
    start = Location(path, 1)
    for place, line in (*read_lines(path), (Location(path, 0), "")):
        if line.strip():
            start = start if block else place
            block.append(line)
        elif block:
            if any(not line.startswith("#") for line in block):
                yield start, block
            block = []


def split(examples: Sequence[E], shares: Sequence[float], seed: int = 0) -> list[list[E]]:
    """Split examples at random into the remainder, and parts with these fractions of the examples.

    >>> from regard.tasks.data import split
    >>> rest, dev = split(list(range(10)), [0.2])
    >>> len(rest), len(dev), sorted(rest + dev) == list(range(10))
    (8, 2, True)
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    parts, start = [], 0
    for share in shares:
        count = max(1, round(share * len(examples)))
        parts.append([examples[i] for i in order[start : start + count]])
        start += count
    rest = [examples[i] for i in order[start:]]
    if not rest:
        raise DataError(f"got {len(examples)} examples, too few to hold some out; expected more, or dev examples")
    return [rest, *parts]


__getattr__ = deprecated.getter("regard.tasks.data")
