"""Plain files, read as examples. What is wrong in one is said with its file, line and cause."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

E = TypeVar("E")

# The last column of a first line that is a header.
_HEADERS = ("label", "target")


class Place(NamedTuple):
    """Where an example stands."""

    file: Path
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class DataError(ValueError):
    """A file is not what it should be; the message says where and how."""


class Pair(NamedTuple):
    """Two sequences, one to become the other."""

    source: str
    target: str
    place: Place


class Tagged(NamedTuple):
    """The words of a sentence, and the tag of each."""

    words: list[str]
    tags: list[str]
    place: Place


class Labelled(NamedTuple):
    """A text and its label."""

    text: str
    label: str
    place: Place


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The lines of a UTF-8 text, gzipped if its name ends in .gz, and where they stand."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is no whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    # Split at line feeds alone: other marks that Unicode takes for line ends occur inside of sentences.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), 1):
        place = Place(path, number)
        try:
            yield place, line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1}, 0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8"
            ) from error


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Pairs of two sequences: from one file with a tab between the two, or from two files with as many lines each."""
    if len(paths) == 1:
        rows = _read_columns(paths[0], "source, tab, target")
        return [Pair(source, target, place) for place, source, target in rows]
    if len(paths) != 2:
        raise DataError(f"{len(paths)} files are given; expected one with two columns, or two with a line each")
    sources, targets = (list(read_lines(path)) for path in paths)
    if len(sources) != len(targets):
        raise DataError(f"{paths[0]} has {len(sources)} lines, but {paths[1]} has {len(targets)}; expected as many")
    pairs = []
    for (place, source), (other, target) in zip(sources, targets, strict=True):
        for where, text in ((place, source), (other, target)):
            if not text.strip():
                raise DataError(f"{where}: is empty, but line {where.line} of the other file is to match it")
        pairs.append(Pair(source.strip(), target.strip(), place))
    return pairs


def read_labelled(paths: Sequence[Path]) -> list[Labelled]:
    """Texts with a label each, a tab between the two."""
    return [
        Labelled(text, label, place) for path in paths for place, text, label in _read_columns(path, "text, tab, label")
    ]


def _read_columns(path: Path, columns: str) -> Iterator[tuple[Place, str, str]]:
    """Lines of two columns; a first line whose second column is "label" or "target" is a header."""
    found = False
    for place, line in read_lines(path):
        parts = [part.strip() for part in line.split("\t")]
        if parts == [""]:
            continue
        if len(parts) != 2:
            raise DataError(f"{place}: has {_count(len(parts), 'column')}; expected two: {columns}")
        if place.line == 1 and parts[1].lower() in _HEADERS:
            continue
        for part, name in zip(parts, ("first", "second"), strict=True):
            if not part:
                raise DataError(f"{place}: the {name} column is empty; expected {columns}")
        found = True
        yield place, parts[0], parts[1]
    if not found:
        raise DataError(f"{path}: has no examples, only a header")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def read_tagged(paths: Sequence[Path]) -> list[Tagged]:
    """Sentences of CoNLL-U, with their universal part-of-speech tags."""
    try:
        import conllu
    except ImportError as error:
        raise ImportError("reading CoNLL-U needs the package conllu: pip install 'regard[tasks]'") from error
    found = []
    for path in paths:
        for place, lines in _read_blocks(path):
            try:
                (sentence,) = conllu.parse("\n".join(lines) + "\n\n")
            except (conllu.exceptions.ParseException, ValueError) as error:
                cause = str(error).strip().splitlines()[0] if str(error).strip() else "it has no words"
                raise DataError(f"{place}: the sentence that begins here is not CoNLL-U ({cause})") from error
            # Numbers that are no ints: ranges of words that are written as one, and words that are not written.
            rows = [row for row in sentence if isinstance(row["id"], int)]
            for row in rows:
                if row.get("upos") in (None, "_"):
                    raise DataError(
                        f"{place}: {row['form']!r}, in the sentence that begins here, has no tag (column 4, UPOS)"
                    )
            if rows:
                found.append(Tagged([row["form"] for row in rows], [row["upos"] for row in rows], place))
    return found


def _read_blocks(path: Path) -> Iterator[tuple[Place, list[str]]]:
    """Runs of lines with empty ones between; without those that are comments alone."""
    block: list[str] = []
    start = Place(path, 1)
    for place, line in (*read_lines(path), (Place(path, 0), "")):
        if line.strip():
            start = start if block else place
            block.append(line)
        elif block:
            if any(not line.startswith("#") for line in block):
                yield start, block
            block = []


def split(examples: Sequence[E], shares: Sequence[float], seed: int = 0) -> list[list[E]]:
    """Deal examples at random into parts of these shares; the first part gets what is left."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    parts, start = [], 0
    for share in shares:
        count = max(1, round(share * len(examples)))
        parts.append([examples[i] for i in order[start : start + count]])
        start += count
    rest = [examples[i] for i in order[start:]]
    if not rest:
        raise DataError(f"{len(examples)} examples are too few to put some aside; give dev examples, or more")
    return [rest, *parts]
