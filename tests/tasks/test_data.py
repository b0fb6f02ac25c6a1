"""Files are read as examples, or raise an error with the location and the cause."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from regard.tasks.data import DataError, Labeled, Location, Pair, Tagged, read_labeled, read_pairs, read_tagged


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    def make(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return make


Write = Callable[[str, bytes | str], Path]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_read_pairs_from_two_files(write: Write, ending: str) -> None:
    one, two = write(f"a.en{ending}", "a b\n\u2028c d\n"), write(f"a.de{ending}", "\ufeffä\r\nö")
    assert read_pairs([one, two]) == [Pair("a b", "ä", Location(one, 1)), Pair("c d", "ö", Location(one, 2))]


def test_read_two_columns(write: Write) -> None:
    path = write("a.tsv", "source\ttarget\na b\tc\n\n x \ty z\n")
    assert read_pairs([path]) == [Pair("a b", "c", Location(path, 2)), Pair("x", "y z", Location(path, 4))]
    path, other = write("b.tsv", "sentence\tLabel\ngood\t1\n"), write("c.tsv", "bad\t0\n")
    assert read_labeled([path, other]) == [
        Labeled("good", "1", Location(path, 2)),
        Labeled("bad", "0", Location(other, 1)),
    ]


CONLLU = """# newdoc
# sent_id = 1

# text = vámonos al mar
1-2	vámonos	_	_	_	_	_	_	_	_
1	vamos	ir	VERB	_	_	0	root	_	_
2	nos	nosotros	PRON	_	_	1	obj	_	_
2.1	x	x	X	_	_	_	_	_	_
3	mar	mar	NOUN	_	_	1	obl	_	_


1	Sí	sí	INTJ	_	_	0	root	_	_
"""


def test_read_tagged(write: Write) -> None:
    path = write("a.conllu.gz", CONLLU)
    assert read_tagged([path]) == [
        Tagged(["vamos", "nos", "mar"], ["VERB", "PRON", "NOUN"], Location(path, 4)),
        Tagged(["Sí"], ["INTJ"], Location(path, 12)),
    ]


def _message(read: Callable[[Sequence[Path]], Any], *paths: Path) -> str:
    with pytest.raises(DataError) as error:
        read(paths)
    return str(error.value).replace(f"{paths[0].parent}/", "")


def test_errors_name_location_and_cause(write: Write, tmp_path: Path) -> None:
    absent = tmp_path / "absent.tsv"
    assert _message(read_pairs, absent) == "absent.tsv: cannot be read (No such file or directory)"
    assert _message(read_pairs, write("e.tsv", " \n\n")) == "e.tsv: is empty"
    assert _message(read_labeled, write("h.tsv", "text\tlabel\n")) == "h.tsv: has no examples, only a header"
    assert _message(read_pairs, write("c.tsv", "a\tb\na b c\n")) == (
        "c.tsv, line 2: has 1 column; expected two: source, tab, target"
    )
    assert _message(read_labeled, write("c.tsv", "a\tb\tc\n")) == (
        "c.tsv, line 1: has 3 columns; expected two: text, tab, label"
    )
    assert _message(read_labeled, write("c.tsv", "a\tb\n\tc\n")) == (
        "c.tsv, line 2: the first column is empty; expected text, tab, label"
    )
    assert _message(read_labeled, write("c.tsv", "a\t \n")) == (
        "c.tsv, line 1: the second column is empty; expected text, tab, label"
    )
    assert _message(read_pairs, write("l.tsv", "a\tb\nsch\xf6n\tc\n".encode("latin-1"))) == (
        "l.tsv, line 2: byte 4, 0xf6, is not UTF-8; save the file as UTF-8"
    )
    assert _message(read_pairs, write("a", "1\n2\n"), write("b", "1\n")) == (
        "a has 2 lines, but b has 1; expected equal numbers"
    )
    assert _message(read_pairs, write("a", "1\n2\n"), write("b", "1\n\n")) == (
        "b, line 2: is empty; expected the counterpart of line 2 of the other file"
    )
    assert _message(read_pairs, *[write("a", "1\n")] * 3) == (
        "got 3 files; expected one with two columns, or two with parallel lines"
    )
    assert _message(read_pairs, write("g.tsv", "a\tb\n").rename(tmp_path / "g.gz")) == (
        "g.gz: is not a complete gzip file (Not a gzipped file (b'a\\t'))"
    )
    short = tmp_path / "t.gz"
    short.write_bytes(gzip.compress(b"a\tb\n" * 99)[:-9])
    assert _message(read_pairs, short).startswith("t.gz: is not a complete gzip file (")
    assert _message(read_tagged, write("u.conllu", "1\ta\ta\t_\t_\t_\t0\troot\t_\t_\n")) == (
        "u.conllu, line 1: 'a', in the sentence that starts here, has no tag (column 4, UPOS)"
    )
    assert _message(read_tagged, write("u.conllu", "\n\n1 a DET\nx\n")).startswith(
        "u.conllu, line 3: the sentence that starts here is not valid CoNLL-U ("
    )
