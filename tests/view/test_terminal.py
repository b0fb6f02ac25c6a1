"""The brief for the terminal, the words for a head, and how tokens read."""

from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support import records
from support.records import seen
from torch import Tensor

from regard.view.brief import briefs
from regard.view.record import check, rows
from regard.view.terminal import terminal
from regard.view.token import read
from regard.watch import Record

WORDS = ["[CLS]", "the", "cat", "sat", "on", "a", "mat", "and", "slept", ".", "[SEP]"]


def random(heads: int, queries: int, keys: int, seed: int = 0, causal: bool = False, sharp: float = 2.0) -> Tensor:
    return records.random(1, heads, queries, keys, seed=seed, causal=causal, sharp=sharp)


def told(weights: Tensor, tokens: list[str], **options: int | str | bool | None) -> list[str]:
    record = seen(weights, **options)  # type: ignore[arg-type]
    (side,) = check([record], tokens, None, 0)
    return [brief.words for brief in briefs(record, rows(record, 0), side)]


def mostly(target: list[int], share: float, size: int) -> Tensor:
    """(size,size) weights: each query gives `share` to its target, the rest evenly to all others."""
    weights = torch.full((size, size), (1 - share) / (size - 1))
    weights[torch.arange(size), torch.tensor(target)] = share
    return weights


def test_habits_are_called_by_name() -> None:
    size = len(WORDS)
    places = list(range(size))
    heads = [
        mostly([max(0, i - 1) for i in places], 0.82, size),
        mostly([min(size - 1, i + 1) for i in places], 0.73, size),
        mostly(places, 0.9, size),
        mostly([0] * size, 0.61, size),
        mostly([size - 1] * size, 0.7, size),
        mostly([9] * size, 0.66, size),
        torch.full((size, size), 1 / size),
    ]
    words = told(torch.stack(heads)[None], WORDS)
    assert words[0] == "previous token 0.82"
    assert words[1] == "next token 0.73"
    assert words[2] == "itself 0.90"
    assert words[3] == "[CLS] 0.61"
    assert words[4] == "[SEP] 0.70"
    assert words[5] == "“.” 0.66"
    assert words[6] == f"spread wide (entropy {math.log(size):.1f} of {math.log(size):.1f})"


def test_the_first_token_of_a_causal_text_is_no_habit_of_its_own_query() -> None:
    size = 7
    weights = torch.tril(torch.full((size, size), 1.0))
    weights = weights / weights.sum(-1, keepdim=True)
    words = told(weights[None, None], [f"w{i}" for i in range(size)], causal=True)
    assert words[0].startswith("spread wide")


def test_a_head_without_a_habit_shows_its_strongest_link_between_words() -> None:
    weights = random(1, len(WORDS), len(WORDS), sharp=1.2)
    weights[0, 0, 2] = 0.07 / (len(WORDS) - 1)
    weights[0, 0, 2, 8] = 0.93
    assert told(weights, WORDS) == ["cat → slept 0.93"]


def test_a_share_that_the_recorded_weights_only_bound_says_so() -> None:
    size = 29
    weights = mostly([0] * size, 0.45, size)
    weights[::2] = torch.full((size,), 0.52 / (size - 2))
    weights[::2, 3], weights[::2, 0] = 0.47, 0.01
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = [f"w{i}" for i in range(size)]
    record = seen(weights[None, None], k=1)
    (side,) = check([record], tokens, None, 0)
    (brief,) = briefs(record, rows(record, 0), side)
    assert brief.pattern == "pair" or "≥" in brief.words
    sink = mostly([0] * size, 0.8, size)
    sink[5] = torch.full((size,), 0.2 / (size - 2))
    sink[5, 7], sink[5, 0] = 0.6, 0.2
    assert told(sink[None, None], tokens, k=1)[0].startswith("first token ≥0.7")


def test_text_that_repeats_itself_shows_heads_that_copy() -> None:
    tokens = ["a", "b", "c", "d", "e", "f", "g", "h"] * 2
    size = len(tokens)
    weights = torch.zeros(size, size)
    for i in range(size):
        weights[i, i - 8 + 1 if i >= 8 else 0] = 1
    assert told(weights[None, None], tokens, causal=True) == ["after an earlier copy 1.00"]


def test_without_entropy_a_head_is_told_by_its_weights() -> None:
    record = replace(seen(torch.full((1, 1, 9, 9), 1 / 9), k=9), entropy=None, received=None)
    (side,) = check([record], list("abcdefghi"), None, 0)
    assert [b.words for b in briefs(record, rows(record, 0), side)] == ["spread wide (entropy 2.2 of 2.2)"]
    bounded = replace(seen(random(1, 9, 9), k=2), entropy=None, received=None)
    assert "received most" in shown([bounded], list("abcdefghi"), 80)


def test_padding_that_no_query_attends_changes_no_word() -> None:
    weights = torch.zeros(1, 1, 9, 9)
    weights[..., 0], weights[..., 1:4] = 0.7, 0.1
    record = seen(weights, causal=True)  # fills up with key -1 where a weight is 0
    record = replace(record, kind="self")
    tokens = ["[CLS]", "a", "b", "[SEP]", *["[PAD]"] * 5]
    (side,) = check([record], tokens, None, 0)
    (brief,) = briefs(record, rows(record, 0), side)
    assert brief.words == "[CLS] 0.70"
    assert brief.room == pytest.approx(math.log(4), abs=1e-6)


def test_nothing_attended_is_said_and_breaks_nothing() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[:, 1] = 0.2
    assert told(weights, list("abcde"), causal=True)[0] == "attends to nothing"


@pytest.mark.parametrize(
    ("tokens", "texts", "joined"),
    [
        (["[CLS]", "un", "##believ", "##able", "[SEP]"], ["[CLS]", "un", "believ", "able", "[SEP]"], [0, 0, 1, 1, 0]),
        (
            ["<|im_end|>", "A", "Ġcat", "s", "Ġ", "Ċ", "Ã©"],
            ["<|im_end|>", "A", "cat", "s", "␣", "↵", "é"],
            [0, 0, 0, 1, 0, 0, 0],
        ),
        (["Ġcaf", "Ã©"], ["caf", "é"], [0, 1]),
        (["<s>", "▁Hel", "lo", "▁", "<0x0A>", "</s>"], ["<s>", "Hel", "lo", "␣", "↵", "</s>"], [0, 0, 1, 0, 0, 0]),
        (["walk@@", "ing", "home"], ["walk", "ing", "home"], [0, 1, 0]),
        (["a</w>", "ca", "t</w>"], ["a", "ca", "t"], [0, 0, 1]),
        (["", "a\x1b[31mb", "x\u202ey"], ["∅", "a␛[31mb", "x\ufffdy"], [0, 0, 0]),
    ],
)
def test_tokens_read_as_a_person_reads(tokens: list[str], texts: list[str], joined: list[int]) -> None:
    readings = read(tokens)
    assert [r.text for r in readings] == texts
    assert [int(r.continues) for r in readings] == joined
    assert [r.raw for r in readings] == tokens


def shown(made: list[Record], tokens: list[str], width: int, colour: bool = False, **options: list[str]) -> str:
    out = io.StringIO()
    system = "truecolor" if colour else None
    console = Console(file=out, width=width, force_terminal=colour, color_system=system)  # type: ignore[arg-type]
    console.print(terminal(made, tokens, **options))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_head_of_a_small_model_has_its_cell(width: int) -> None:
    records = [seen(random(12, 11, 11, seed=layer), layer) for layer in range(6)]
    text = shown(records, WORDS, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for layer in range(6):
        part = text.split(f"layer {layer} ")[1].split("received most")[0]
        for head in range(12):
            assert re.search(rf"(^|\s){head} [^\s\w]", part), f"layer {layer} head {head} is missing"


def test_a_deep_model_takes_a_line_a_layer() -> None:
    tokens = ["<|endoftext|>", *[f"Ġw{i}" for i in range(23)]]
    records = [seen(random(9, 24, 24, seed=layer, causal=True), layer, causal=True) for layer in range(30)]
    lines = shown(records, tokens, 80).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80


def test_markup_in_tokens_stays_text() -> None:
    tokens = ["[red]", "[/]", "[bold]x", "\x1b[2J", "[link=http://a]"]
    text = shown([seen(random(2, 5, 5))], tokens, 100)
    for token in ("[red]", "[/]", "[bold]x", "[link=http://a]"):
        assert token in text
    assert "\x1b" not in text


def test_shading_survives_without_colour_as_bars() -> None:
    weights = mostly([2] * 5, 0.4, 5)[None, None]
    plain = shown([seen(weights)], list("abcde"), 80)
    assert "c▇" in plain
    assert "a▃" in plain
    coloured = shown([seen(weights)], list("abcde"), 80, colour=True)
    assert "▇" not in coloured
    assert "\x1b[" in coloured


def test_an_ascii_console_gets_ascii() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=out, width=80).print(terminal([seen(random(3, 6, 6))], ["[CLS]", "naïve", "→", "“", "日本", "[SEP]"]))
    out.flush()


def test_cross_attention_reads_two_texts() -> None:
    source = ["Ein", "Hund", "läuft"]
    records = [seen(random(2, 5, 5, causal=True), causal=True), seen(random(2, 5, 3), 0, kind="cross")]
    text = shown(records, list("abcde"), 80, key_tokens=source)
    assert "cross layer 0" in text
    assert "Hund" in text


def test_errors_name_the_argument() -> None:
    record = seen(random(2, 5, 5))
    with pytest.raises(ValueError, match="records is empty"):
        terminal([], ["a"])
    with pytest.raises(ValueError, match="tokens has 4 entries: expected 5"):
        terminal([record], list("abcd"))
    with pytest.raises(ValueError, match="batch is 1: expected 0 <= batch < 1"):
        terminal([record], list("abcde"), batch=1)
    with pytest.raises(ValueError, match="key_tokens has 2 entries: expected 3"):
        terminal([seen(random(2, 5, 3), kind="cross")], list("abcde"), key_tokens=["x", "y"])
    with pytest.raises(ValueError, match="tokens is empty"):
        terminal([record], [])


def test_without_rich_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"pip install 'regard\[look\]'"):
        terminal([seen(random(2, 5, 5))], list("abcde"))
