"""Texts become numbers, and the same texts again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.data import DataError
from regard.tasks.tokens import END, PAD, START, UNKNOWN, Tokens

_TEXTS = ["Two young men are outside.", "Zwei junge Männer sind im Freien, (nicht) drinnen!", "the man, a man; men"] * 3


def test_pieces_come_back_as_they_were() -> None:
    tokens = Tokens.pieces(_TEXTS, 120)
    assert len(tokens) <= 120
    for text in _TEXTS:
        assert tokens.decode(tokens.encode(text)) == text
    # A mark is a token of its own, so a word is the same beside one.
    assert tokens.names(tokens.encode("man,")) == [*tokens.names(tokens.encode("man")), ","]
    assert tokens.encode("漢") == [*tokens.encode("")[:1], *tokens.encode("漢")]
    assert UNKNOWN in tokens.encode("漢")


@given(st.lists(st.sampled_from(["a", "men", "Zwei", "!", "(", "x,y"]), min_size=1, max_size=9))
def test_pieces_keep_words_apart(words: list[str]) -> None:
    tokens = Tokens.pieces([*_TEXTS, "a x,y !"], 90)
    assert tokens.decode(tokens.encode(" ".join(words))) == " ".join(words)


def test_letters_and_words() -> None:
    letters = Tokens.letters(["cab bag\n", "é"])
    assert letters.names(letters.encode("bé g")) == ["b", "é", " ", "g"]
    assert letters.encode("e\u0301") == letters.encode("é")  # written in two ways
    assert letters.decode(letters.encode("a bag\n")) == "a bag\n"
    words = Tokens.words(["K AE1 T", "K AE1 B  K"], 100)
    assert [words.names([n])[0] for n in range(4, len(words))] == [
        "K",
        "AE1",
        "B",
        "T",
    ]  # by frequency, then by the alphabet
    assert words.encode("T X\tK") == [7, UNKNOWN, 4]
    assert words.decode([START, *words.encode("T K"), END, PAD]) == "T K"
    assert len(Tokens.words(["a a a b b c"], 6)) == 6
    assert len(Tokens.words(["a a a b b c"], 99, least=2)) == 6
    lower = Tokens.words(["A a"], 99, lowercase=True)
    assert lower.encode("A") == lower.encode("a") == [4]


def test_a_text_cannot_name_a_special_token() -> None:
    for tokens in (
        Tokens.words(["<s> a </s>"], 9),
        Tokens.letters(["<s>"]),
        Tokens.pieces(["<s> a", "a </s> <pad>"], 30),
    ):
        assert not {PAD, START, END} & set(tokens.encode("a <s> </s> <pad>"))


def test_many_are_as_one_and_one() -> None:
    tokens = Tokens.pieces(_TEXTS, 60)
    assert tokens.encode_all(_TEXTS) == [tokens.encode(text) for text in _TEXTS]


def test_kept_in_a_file(tmp_path: Path) -> None:
    for number, tokens in enumerate((Tokens.pieces(_TEXTS, 60), Tokens.letters(_TEXTS), Tokens.words(_TEXTS, 9))):
        path = tmp_path / f"{number}.json"
        tokens.save(path)
        again = Tokens.load(path)
        assert len(again) == len(tokens)
        for text in _TEXTS:
            assert again.encode(text) == tokens.encode(text)
            assert again.decode(again.encode(text)) == tokens.decode(tokens.encode(text))


def test_what_is_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"v\.json: is no vocabulary of the package tokenizers \("):
        Tokens.load(path)
    with pytest.raises(DataError, match=r"v\.json: is no vocabulary"):
        Tokens.load(tmp_path / "absent" / "v.json")
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(path))
    with pytest.raises(
        DataError, match=r"v\.json: the vocabulary numbers <pad>, <unk>, <s>, </s> as .*; expected 0 to 3"
    ):
        Tokens.load(path)
