"""Files are read as examples, or raise an error with the location and the cause."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from regard.tasks.data import Labeled, Pair, Tagged, read_labeled, read_pairs, read_tagged
from regard.tasks.lines import DataError, Location


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
    assert _message(read_pairs, write("a", "1\n2\n"), write("b", "1\n")) == (
        "a has 2 lines, but b has 1; expected equal numbers"
    )
    assert _message(read_pairs, write("a", "1\n2\n"), write("b", "1\n\n")) == (
        "b, line 2: is empty; expected the counterpart of line 2 of the other file"
    )
    assert _message(read_pairs, *[write("a", "1\n")] * 3) == (
        "got 3 files; expected one with two columns, or two with parallel lines"
    )
    assert _message(read_tagged, write("u.conllu", "1\ta\ta\t_\t_\t_\t0\troot\t_\t_\n")) == (
        "u.conllu, line 1: 'a' has no tag (column 4, UPOS)"
    )
    assert _message(read_tagged, write("u.conllu", "\n\n1 a DET\nx\n")).startswith(
        "u.conllu, line 3: the sentence that starts here is not valid CoNLL-U ("
    )


def test_words_and_tags_that_are_absent_are_named_by_their_line(write: Write) -> None:
    """Also after comments, multiword tokens and empty nodes."""
    lines = CONLLU.splitlines()
    assert lines[8].startswith("3\tmar")
    for number, old, new, cause in (
        (9, "NOUN", "_", "'mar' has no tag (column 4, UPOS)"),
        (9, "NOUN", "", "'mar' has no tag (column 4, UPOS)"),
        (9, "NOUN", " ", "'mar' has no tag (column 4, UPOS)"),
        (7, "\tnos\t", "\t\t", "has no word (column 2, FORM)"),
        (12, "\tSí\t", "\t \t", "has no word (column 2, FORM)"),
    ):
        changed = [*lines[: number - 1], lines[number - 1].replace(old, new, 1), *lines[number:]]
        assert changed != lines
        path = write("u.conllu", "\n".join(changed) + "\n")
        assert _message(read_tagged, path) == f"u.conllu, line {number}: {cause}"
    # An underscore is a word of its own.
    assert read_tagged([write("u.conllu", "1\t_\t_\tSYM\t_\t_\t0\troot\t_\t_\n")])[0].words == ["_"]


HEADERS = [
    "text\tlabel", "sentence\tlabel", "Text\tSentiment", "review\tclass", "#text\tcategory", '"text"\t"Label"',
    "source\ttarget", "src\ttgt", "English\tGerman", "en\tde", "word\tpronunciation", "x\ty", "tweet\tis_toxic",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers_are_recognized(write: Write, header: str) -> None:
    path = write("a.tsv", f"{header}\na film\tgood\n")
    assert read_labeled([path]) == [Labeled("a film", "good", Location(path, 2))]


def test_headers_of_unknown_names_are_recognized_where_labels_recur(write: Write) -> None:
    lines = "a film\tgood\nanother film\tbad\n" * 5
    path = write("a.tsv", f"Kommentar\tKlasse\n{lines}")
    assert [example.label for example in read_labeled([path])] == ["good", "bad"] * 5
    for first in ("great\tgood\n", "a great film\tneutral\n"):
        assert len(read_labeled([write("a.tsv", first + lines)])) == 11
    assert len(read_labeled([write("a.tsv", f"great\tneutral\n{lines}a film\tmixed\n")])) == 12


@pytest.mark.parametrize("line", ["a class\tgood", "text\tbad", "my review\tscore", "en\tbad", "English\tDeutsch"])
def test_first_lines_that_are_examples_are_kept(write: Write, line: str) -> None:
    assert len(read_labeled([write("a.tsv", f"{line}\na film\tbad\n")])) == 2
    assert len(read_pairs([write("a.tsv", f"a film\tbad\n{HEADERS[0]}\n")])) == 2, "only the first line is a header"


def test_commas_are_named(write: Write) -> None:
    assert _message(read_labeled, write("a.csv", "a film,good\n")) == (
        "a.csv, line 1: has 1 column; expected two: text, tab, label (columns are separated by tabs, not by commas)"
    )


def test_swapped_columns_are_named_in_one_line(write: Write) -> None:
    path = write("a.tsv", "".join(f"{'pos' if n % 2 else 'neg'}\tA long review, number {n}\n" for n in range(300)))
    assert _message(read_labeled, path) == (
        "a.tsv: column 2 has 300 different labels in 300 examples, column 1 has 2; are the columns swapped?"
    )


def test_labels_are_compared_in_normal_form(write: Write) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    path = write("a.tsv", f"one\t{composed}\ntwo\t{decomposed}\n")
    assert [example.label for example in read_labeled([path])] == [composed] * 2
    path = write("a.conllu", f"1\t{decomposed}\t_\t{decomposed}\t_\t_\t0\troot\t_\t_\n")
    assert read_tagged([path]) == [Tagged([decomposed], [composed], Location(path, 1))]


def test_columns_in_quotes_are_unquoted(write: Write) -> None:
    path = write("a.tsv", '"text"\t"label"\n"a ""good"" film"\t"pos"\n"a bad film"\t"neg"\n')
    assert [example[:2] for example in read_labeled([path])] == [('a "good" film', "pos"), ("a bad film", "neg")]
    path = write("a.tsv", '"a good" film\tpos\n"a bad film"\tneg\n')
    assert [example.text for example in read_labeled([path])] == ['"a good" film', '"a bad film"']


def test_file_without_sentences_is_named(write: Write) -> None:
    assert _message(read_tagged, write("c.conllu", "# only\n# comments\n\n")) == "c.conllu: has no sentences"
