"""Remarks on texts reach the terminal, the page, and saved recordings."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.page import block
from support.records import make_record, random_weights

from regard.view.page import page
from regard.view.remarks import remarks
from regard.view.terminal import terminal
from regard.view.token import isolate
from regard.watch import Recording

UNKNOWN = "2 of 9 tokens are unknown to the model ([UNK]): it cannot tell them from other words."
SHORT = "The text has fewer than 8 tokens: most patterns of heads cannot be recognized in it."


def printed(tokens: list[str], color: bool = True) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal([make_record(random_weights(1, 2, len(tokens), len(tokens), seed=0))], tokens))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_unknown_tokens_are_announced_in_terminal_and_page() -> None:
    tokens = ["[CLS]", "the", "[UNK]", "of", "my", "[UNK]", "is", ".", "[SEP]"]
    assert UNKNOWN in printed(tokens)
    assert block(page([make_record(random_weights(1, 2, 9, 9, seed=0))], tokens))["notes"] == [UNKNOWN]


@pytest.mark.parametrize("name", ["[UNK]", "<unk>", "▁<unk>", "<UNK>", "<|unk|>"])
def test_unknown_tokens_of_other_vocabularies(name: str) -> None:
    (remark,) = remarks(["a", "b", "c", "d", "e", "f", "g", name])
    assert remark == f"1 of 8 tokens is unknown to the model ({name}): it cannot tell it from other words."


def test_texts_of_common_words_have_no_remarks() -> None:
    assert remarks(["the", "unknown", "unk", "of", "my", "cat", "is", "[MASK]"], None) == []


def test_short_texts_are_announced_in_terminal_and_page() -> None:
    tokens = ["the", "cat", "sat"]
    assert SHORT in printed(tokens)
    assert block(page([make_record(random_weights(1, 2, 3, 3, seed=0))], tokens))["notes"] == [SHORT]
    assert remarks(tokens, ["le", "chat"]) == [
        SHORT.replace("The text has", "The texts have").replace("in it", "in them")
    ]
    assert remarks(tokens, list("abcdefgh")) == []


def test_notes_are_shown_and_saved(tmp_path: Path) -> None:
    record = make_record(random_weights(1, 2, 9, 9, seed=0))
    cut = "The last 12 tokens exceed the model's maximum length and are omitted."
    assert block(page([record], list("abcdefghi"), notes=[cut]))["notes"] == [cut]
    recording = Recording([record], list("abcdefghi"), notes=[cut])
    recording.save(tmp_path / "r.safetensors")
    assert Recording.load(tmp_path / "r.safetensors").notes == [cut]
    assert recording.joined().notes == recording.text(0).notes == [cut]


def test_tokens_from_right_to_left_are_isolated_in_sentences_but_not_in_terminals() -> None:
    weights = random_weights(1, 1, 9, 9, seed=0, sharp=6.0)
    tokens = ["[CLS]", *"ابتثجحخ", "[SEP]"]
    head = block(page([make_record(weights)], tokens))["layers"][0]["heads"][0]
    query, key, _ = head["pair"]
    link = f"{isolate(tokens[query])} → {isolate(tokens[key])}"
    assert head["words"].startswith(link)
    assert "\u2068" in link
    assert not {"\u2068", "\u2069"} & {*printed(tokens)}
