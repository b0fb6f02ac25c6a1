"""Reading of examples from text files. Errors name the file, the line and the cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from regard import deprecated
from regard.error_text import first_line
from regard.tasks.labels import describe_swap, normalize_label
from regard.tasks.lines import DataError, Location, read_lines

# A first line is a header if its second column, which no other line has, is one of these,
_HEADERS = {"label", "labels", "target"}
# or its first column is one of these,
_TEXT_NAMES = {
    "text", "texts", "sentence", "sentences", "review", "document", "comment", "tweet", "message", "title", "headline",
    "body", "content", "description", "question", "utterance", "phrase", "query", "input", "x", "source", "src", "word",
}  # fmt: skip
# or both are names of languages. In files of at least _MANY lines, unknown names are recognized, too.
_MANY = 10
_LANGUAGES = {
    "arabic", "chinese", "czech", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hebrew",
    "hindi", "hungarian", "italian", "japanese", "korean", "norwegian", "polish", "portuguese", "romanian", "russian",
    "spanish", "swedish", "turkish", "ukrainian", "vietnamese", "ar", "zh", "cs", "da", "nl", "en", "fi", "fr", "de", "el",
    "he", "hi", "hu", "it", "ja", "ko", "pl", "pt", "ro", "ru", "es", "sv", "tr", "uk", "vi",
}  # fmt: skip


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
    """Read texts and labels from files with two tab-separated columns. Labels are in Unicode normalization form C."""
    examples = [
        Labeled(text, normalize_label(label), place)
        for path in paths
        for place, text, label in _read_columns(path, "text, tab, label")
    ]
    swap = describe_swap([example.text for example in examples], [example.label for example in examples])
    if swap is not None:
        raise DataError(f"{', '.join(map(str, paths))}: {swap}")
    return examples


def _read_columns(path: Path, columns: str) -> list[tuple[Location, str, str]]:
    """Return the lines of a file with two columns, except a header in the first line. A column that is in quotes in all
    lines is unquoted."""
    rows: list[tuple[Location, list[str]]] = []
    for place, line in read_lines(path):
        parts = [part.strip() for part in line.split("\t")]
        if parts == [""]:
            continue
        if len(parts) != 2:
            cause = f"{place}: has {len(parts)} column{'s' * (len(parts) != 1)}; expected two: {columns}"
            commas = len(parts) == 1 and any(mark in line for mark in ",;")
            raise DataError(f"{cause} (columns are separated by tabs, not by commas)" if commas else cause)
        rows.append((place, parts))
    place, (first, second) = rows[0]
    if place.line == 1 and _is_header(first, second, Counter(parts[1] for _, parts in rows[1:])):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path}: has no examples, only a header")
    for place, parts in rows:
        for part, name in zip(parts, ("first", "second"), strict=True):
            if not part:
                raise DataError(f"{place}: the {name} column is empty; expected {columns}")
    texts, labels = (_unquote([parts[n] for _, parts in rows]) for n in range(2))
    return [(place, text, label) for (place, _), text, label in zip(rows, texts, labels, strict=True)]


def _is_header(first: str, second: str, others: Counter[str]) -> bool:
    """Return whether these are the names of two columns, and no example. `others` counts the other values of the second."""
    if second in others:
        return False
    # One word, with a label that no other line has, while each of the others recurs.
    if others.total() >= _MANY and min(others.values()) > 1 and len(first.split()) == 1:
        return True
    first, second = (name.lstrip("#").strip(" \"'").casefold() for name in (first, second))
    return second in _HEADERS or first in _TEXT_NAMES or (first in _LANGUAGES and second in _LANGUAGES)


def _unquote(values: list[str]) -> list[str]:
    """Remove quotes around all values, as in CSV."""
    if all(len(value) > 1 and value[0] == value[-1] == '"' for value in values):
        return [value[1:-1].replace('""', '"').strip() for value in values]
    return values


def read_tagged(paths: Sequence[Path]) -> list[Tagged]:
    """Read sentences with universal part-of-speech tags from CoNLL-U files."""
    try:
        import conllu
    except ImportError as error:
        raise ImportError("reading CoNLL-U needs the package conllu: pip install 'regard[tasks]'") from error
    sentences: list[Tagged] = []
    for path in paths:
        before = len(sentences)
        for place, lines in _read_blocks(path):
            try:
                (sentence,) = conllu.parse("\n".join(lines) + "\n\n")
            except (conllu.exceptions.ParseException, ValueError) as error:
                cause = first_line(error, "it has no words")
                raise DataError(f"{place}: the sentence that starts here is not valid CoNLL-U ({cause})") from error
            words, tags = [], []
            numbers = [place.line + i for i, line in enumerate(lines) if not line.startswith("#")]
            for number, row in zip(numbers, sentence, strict=True):
                if not isinstance(row["id"], int):
                    continue  # the range of a multiword token, or an empty node
                form, tag = (row.get(name) or "" for name in ("form", "upos"))
                if not form.strip():
                    raise DataError(f"{place.file}, line {number}: has no word (column 2, FORM)")
                if tag.strip() in ("", "_"):
                    raise DataError(f"{place.file}, line {number}: {form!r} has no tag (column 4, UPOS)")
                words.append(form)
                tags.append(normalize_label(tag))
            if words:
                sentences.append(Tagged(words, tags, place))
        if len(sentences) == before:
            raise DataError(f"{path}: has no sentences")
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


__getattr__ = deprecated.getter("regard.tasks.data")
