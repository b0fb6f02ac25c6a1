"""Scripts without spaces between words, and characters that a model does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard.models.beam import Hypothesis
from regard.tasks.classify import Classify, ClassifySettings
from regard.tasks.data import Labeled, Pair, Tagged
from regard.tasks.lines import Location
from regard.tasks.scripts import bleu_tokenizer
from regard.tasks.tag import Tag, TagSettings
from regard.tasks.task import Task
from regard.tasks.tokens import UNKNOWN
from regard.tasks.translate import Translate, TranslateSettings

PLACE = Location(Path("a.tsv"), 1)
TEXTS = ["我爱这只小猫。", "我们在公园里散步, ok?", "犬が公園を走っている。", "สุนัขวิ่งในสวน", "The dog runs."]


def translator(pairs: list[tuple[str, str]]) -> Translate:
    settings = TranslateSettings(model="recurrent", width=16, hidden=16, layers=1)
    return Translate.begin(settings, [Pair(source, target, PLACE) for source, target in pairs])


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_no_clauses(text: str) -> None:
    """However often a text occurs, its characters stay pieces where its script has no spaces."""
    task = translator([(text, text)] * 50 + [(other, other) for other in TEXTS])
    ids = task.source.encode(text)
    names = task.source.names(ids)
    if text != TEXTS[-1]:
        assert max(map(len, names)) <= 3, names
        assert len(names) > len(text) / 2
    assert UNKNOWN not in ids
    assert task.target.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "tokenizer"), list(zip(TEXTS, ["zh", "zh", "char", "char", "13a"], strict=True)), ids=[*"abcde"]
)
def test_bleu_counts_parts_of_sentences(text: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default tokenizer, a sentence without spaces would be right or wrong as a whole."""
    assert bleu_tokenizer([text]) == tokenizer
    task = translator([(text, text)] * 2)
    found = {"right": task.target.encode(text), "last wrong": task.target.encode(text[:-1])}

    def bleu(name: str) -> float:
        monkeypatch.setattr(task, "_search", lambda *arguments: [Hypothesis(found[name], 0.0)])
        return task.evaluate([Pair(text, text, PLACE)])["BLEU"]

    assert bleu("right") == pytest.approx(100)
    if tokenizer != "13a":
        assert 50 < bleu("last wrong") < 99


@pytest.mark.parametrize("task", [Classify, Tag])
def test_unknown_letters_and_words_are_announced(task: type[Task]) -> None:
    words = ["a", "good", "film", "and", "a", "bad", "film"]
    made = {
        Classify: lambda: Classify.begin(ClassifySettings(width=16, heads=2), [Labeled(" ".join(words), x, PLACE) for x in "+-"]),
        Tag: lambda: Tag.begin(TagSettings(width=16, heads=2), [Tagged(words, [*"DANCDAN"], PLACE)] * 2),
    }[task]()  # fmt: skip
    assert made.remarks_on_texts(["a good film", "", "bad"]) == []
    assert made.remarks_on_texts(["a bad 🙂"]) == [
        "1 of 4 characters is unknown to the model, which cannot tell it from others: '🙂'"
    ]
    letters, unknown = made.remarks_on_texts(["我爱 film"])
    assert letters == "2 of 6 characters are unknown to the model, which cannot tell them from others: '我', '爱'"
    assert unknown == (
        "2 of 3 words are not in the vocabulary of the model, which reads only their letters: '我', '爱'"
    )


def test_unknown_characters_of_a_source_are_announced() -> None:
    task = translator([("a dog", "ein Hund"), ("a cat", "eine Katze")])
    assert task.remarks_on_texts(["a dog", "a cat"]) == []
    assert task.remarks_on_texts(["a 狗"]) == [
        "1 of 2 characters is unknown to the model, which cannot tell it from others: '狗'"
    ]
