"""Vocabularies convert texts to token IDs and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.lines import DataError
from regard.tasks.tokens import END, PAD, START, UNKNOWN, Tokens

_TEXTS = ["Two young men are outside.", "Zwei junge Männer sind im Freien, (nicht) drinnen!", "the man, a man; men"] * 3


def test_pieces_round_trip() -> None:
    tokens = Tokens.pieces(_TEXTS, 120)
    assert len(tokens) <= 120
    for text in _TEXTS:
        assert tokens.decode(tokens.encode(text)) == text
    # Punctuation marks are separate tokens, so that a word next to one has the same pieces.
    assert tokens.names(tokens.encode("man,")) == [*tokens.names(tokens.encode("man")), ","]
    assert tokens.encode("漢") == [*tokens.encode("")[:1], *tokens.encode("漢")]
    assert UNKNOWN in tokens.encode("漢")


@given(st.lists(st.sampled_from(["a", "men", "Zwei", "!", "(", "x,y"]), min_size=1, max_size=9))
def test_pieces_preserve_word_boundaries(words: list[str]) -> None:
    tokens = Tokens.pieces([*_TEXTS, "a x,y !"], 90)
    assert tokens.decode(tokens.encode(" ".join(words))) == " ".join(words)


def test_letters_and_words_encode_and_decode() -> None:
    letters = Tokens.letters(["cab bag\n", "é"])
    assert letters.names(letters.encode("bé g")) == ["b", "é", " ", "g"]
    assert letters.encode("e\u0301") == letters.encode("é")  # composed and decomposed
    assert letters.decode(letters.encode("a bag\n")) == "a bag\n"
    words = Tokens.words(["K AE1 T", "K AE1 B  K"], 100)
    assert [words.names([n])[0] for n in range(4, len(words))] == [
        "K",
        "AE1",
        "B",
        "T",
    ]  # by frequency, then alphabetically
    assert words.encode("T X\tK") == [7, UNKNOWN, 4]
    assert words.decode([START, *words.encode("T K"), END, PAD]) == "T K"
    assert len(Tokens.words(["a a a b b c"], 6)) == 6
    assert len(Tokens.words(["a a a b b c"], 99, least=2)) == 6
    lower = Tokens.words(["A a"], 99, lowercase=True)
    assert lower.encode("A") == lower.encode("a") == [4]


def test_special_tokens_in_text_are_not_encoded() -> None:
    for tokens in (
        Tokens.words(["<s> a </s>"], 9),
        Tokens.letters(["<s>"]),
        Tokens.pieces(["<s> a", "a </s> <pad>"], 30),
    ):
        assert not {PAD, START, END} & set(tokens.encode("a <s> </s> <pad>"))


def test_encode_all_matches_encode() -> None:
    tokens = Tokens.pieces(_TEXTS, 60)
    assert tokens.encode_all(_TEXTS) == [tokens.encode(text) for text in _TEXTS]


def test_save_and_load(tmp_path: Path) -> None:
    for number, tokens in enumerate((Tokens.pieces(_TEXTS, 60), Tokens.letters(_TEXTS), Tokens.words(_TEXTS, 9))):
        path = tmp_path / f"{number}.json"
        tokens.save(path)
        again = Tokens.load(path)
        assert len(again) == len(tokens)
        for text in _TEXTS:
            assert again.encode(text) == tokens.encode(text)
            assert again.decode(again.encode(text)) == tokens.decode(tokens.encode(text))


def test_load_rejects_invalid_file(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"v\.json: is not a vocabulary of the package tokenizers \("):
        Tokens.load(path)
    with pytest.raises(DataError, match=r"v\.json: is not a vocabulary"):
        Tokens.load(tmp_path / "absent" / "v.json")
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(path))
    with pytest.raises(DataError, match=r"v\.json: the IDs of <pad>, <unk>, <s>, </s> are .*; expected 0 to 3"):
        Tokens.load(path)
