"""The terminal view, the descriptions of heads, and readable tokens."""

from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.records import make_record, random_weights
from torch import Tensor

from regard.view.describe import describe_heads
from regard.view.record import check, rows
from regard.view.terminal import terminal
from regard.view.token import read
from regard.watch import Record

WORDS = ["[CLS]", "the", "cat", "sat", "on", "a", "mat", "and", "slept", ".", "[SEP]"]


def random_heads(
    heads: int, queries: int, keys: int, seed: int = 0, causal: bool = False, sharp: float = 2.0
) -> Tensor:
    return random_weights(1, heads, queries, keys, seed=seed, causal=causal, sharp=sharp)


def describe(weights: Tensor, tokens: list[str], **options: int | str | bool | None) -> list[str]:
    record = make_record(weights, **options)  # type: ignore[arg-type]
    (side,) = check([record], tokens, None, 0)
    return [head.text for head in describe_heads(record, rows(record, 0), side)]


def mostly(target: list[int], share: float, size: int) -> Tensor:
    """Return weights (size, size): each query gives `share` to its target, and the rest uniformly to all others."""
    weights = torch.full((size, size), (1 - share) / (size - 1))
    weights[torch.arange(size), torch.tensor(target)] = share
    return weights


def test_describe_heads_names_patterns() -> None:
    size = len(WORDS)
    positions = list(range(size))
    heads = [
        mostly([max(0, i - 1) for i in positions], 0.82, size),
        mostly([min(size - 1, i + 1) for i in positions], 0.73, size),
        mostly(positions, 0.9, size),
        mostly([0] * size, 0.61, size),
        mostly([size - 1] * size, 0.7, size),
        mostly([9] * size, 0.66, size),
        torch.full((size, size), 1 / size),
    ]
    texts = describe(torch.stack(heads)[None], WORDS)
    assert texts[0] == "previous token 0.82"
    assert texts[1] == "next token 0.73"
    assert texts[2] == "itself 0.90"
    assert texts[3] == "[CLS] 0.61"
    assert texts[4] == "[SEP] 0.70"
    assert texts[5] == "“.” 0.66"
    assert texts[6] == f"broad (entropy {math.log(size):.1f} of {math.log(size):.1f})"


def test_describe_heads_ignores_queries_with_a_single_key() -> None:
    size = 7
    weights = torch.tril(torch.full((size, size), 1.0))
    weights = weights / weights.sum(-1, keepdim=True)
    texts = describe(weights[None, None], [f"w{i}" for i in range(size)], causal=True)
    assert texts[0].startswith("broad")


def test_describe_heads_reports_strongest_link_without_pattern() -> None:
    weights = random_heads(1, len(WORDS), len(WORDS), sharp=1.2)
    weights[0, 0, 2] = 0.07 / (len(WORDS) - 1)
    weights[0, 0, 2, 8] = 0.93
    assert describe(weights, WORDS) == ["cat → slept 0.93"]


def test_describe_heads_marks_lower_bounds_of_shares() -> None:
    size = 29
    weights = mostly([0] * size, 0.45, size)
    weights[::2] = torch.full((size,), 0.52 / (size - 2))
    weights[::2, 3], weights[::2, 0] = 0.47, 0.01
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = [f"w{i}" for i in range(size)]
    record = make_record(weights[None, None], k=1)
    (side,) = check([record], tokens, None, 0)
    (head,) = describe_heads(record, rows(record, 0), side)
    assert head.pattern == "pair" or "≥" in head.text
    sink = mostly([0] * size, 0.8, size)
    sink[5] = torch.full((size,), 0.2 / (size - 2))
    sink[5, 7], sink[5, 0] = 0.6, 0.2
    assert describe(sink[None, None], tokens, k=1)[0].startswith("first token ≥0.7")


def test_describe_heads_detects_induction() -> None:
    tokens = ["a", "b", "c", "d", "e", "f", "g", "h"] * 2
    size = len(tokens)
    weights = torch.zeros(size, size)
    for i in range(size):
        weights[i, i - 8 + 1 if i >= 8 else 0] = 1
    assert describe(weights[None, None], tokens, causal=True) == ["after an earlier copy 1.00"]


def test_describe_heads_without_recorded_entropy() -> None:
    record = replace(make_record(torch.full((1, 1, 9, 9), 1 / 9), k=9), entropy=None, received=None)
    (side,) = check([record], list("abcdefghi"), None, 0)
    assert [head.text for head in describe_heads(record, rows(record, 0), side)] == ["broad (entropy 2.2 of 2.2)"]
    bounded = replace(make_record(random_heads(1, 9, 9), k=2), entropy=None, received=None)
    assert "received most" in render([bounded], list("abcdefghi"), 80)


def test_describe_heads_ignores_padding() -> None:
    weights = torch.zeros(1, 1, 9, 9)
    weights[..., 0], weights[..., 1:4] = 0.7, 0.1
    record = make_record(weights, causal=True)  # weights of 0 are padded with key -1
    record = replace(record, kind="self")
    tokens = ["[CLS]", "a", "b", "[SEP]", *["[PAD]"] * 5]
    (side,) = check([record], tokens, None, 0)
    (head,) = describe_heads(record, rows(record, 0), side)
    assert head.text == "[CLS] 0.70"
    assert head.max_entropy == pytest.approx(math.log(4), abs=1e-6)


def test_describe_heads_reports_heads_without_attention() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[:, 1] = 0.2
    assert describe(weights, list("abcde"), causal=True)[0] == "attends to nothing"


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
def test_read_removes_tokenizer_marks(tokens: list[str], texts: list[str], joined: list[int]) -> None:
    readings = read(tokens)
    assert [r.text for r in readings] == texts
    assert [int(r.continues) for r in readings] == joined
    assert [r.raw for r in readings] == tokens


def render(records: list[Record], tokens: list[str], width: int, color: bool = False, **options: list[str]) -> str:
    out = io.StringIO()
    system = "truecolor" if color else None
    console = Console(file=out, width=width, force_terminal=color, color_system=system)  # type: ignore[arg-type]
    console.print(terminal(records, tokens, **options))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_terminal_shows_one_cell_per_head(width: int) -> None:
    records = [make_record(random_heads(12, 11, 11, seed=layer), layer) for layer in range(6)]
    text = render(records, WORDS, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for layer in range(6):
        part = text.split(f"layer {layer} ")[1].split("received most")[0]
        for head in range(12):
            assert re.search(rf"(^|\s){head} [^\s\w]", part), f"layer {layer} head {head} is missing"


def test_terminal_shows_one_line_per_layer_of_deep_models() -> None:
    tokens = ["<|endoftext|>", *[f"Ġw{i}" for i in range(23)]]
    records = [make_record(random_heads(9, 24, 24, seed=layer, causal=True), layer, causal=True) for layer in range(30)]
    lines = render(records, tokens, 80).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80


def test_terminal_does_not_parse_markup_in_tokens() -> None:
    tokens = ["[red]", "[/]", "[bold]x", "\x1b[2J", "[link=http://a]"]
    text = render([make_record(random_heads(2, 5, 5))], tokens, 100)
    for token in ("[red]", "[/]", "[bold]x", "[link=http://a]"):
        assert token in text
    assert "\x1b" not in text


def test_terminal_draws_bars_without_colors() -> None:
    weights = mostly([2] * 5, 0.4, 5)[None, None]
    plain = render([make_record(weights)], list("abcde"), 80)
    assert "c▇" in plain
    assert "a▃" in plain
    colored = render([make_record(weights)], list("abcde"), 80, color=True)
    assert "▇" not in colored
    assert "\x1b[" in colored


def test_terminal_on_ascii_console() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=out, width=80).print(
        terminal([make_record(random_heads(3, 6, 6))], ["[CLS]", "naïve", "→", "“", "日本", "[SEP]"])
    )
    out.flush()


def test_terminal_cross_attention_has_two_texts() -> None:
    source = ["Ein", "Hund", "läuft"]
    records = [
        make_record(random_heads(2, 5, 5, causal=True), causal=True),
        make_record(random_heads(2, 5, 3), 0, kind="cross"),
    ]
    text = render(records, list("abcde"), 80, key_tokens=source)
    assert "cross layer 0" in text
    assert "Hund" in text


def test_invalid_arguments_are_named() -> None:
    record = make_record(random_heads(2, 5, 5))
    with pytest.raises(ValueError, match="records is empty"):
        terminal([], ["a"])
    with pytest.raises(ValueError, match="tokens has 4 entries: expected 5"):
        terminal([record], list("abcd"))
    with pytest.raises(ValueError, match="batch is 1: expected 0 <= batch < 1"):
        terminal([record], list("abcde"), batch=1)
    with pytest.raises(ValueError, match="key_tokens has 2 entries: expected 3"):
        terminal([make_record(random_heads(2, 5, 3), kind="cross")], list("abcde"), key_tokens=["x", "y"])
    with pytest.raises(ValueError, match="tokens is empty"):
        terminal([record], [])


def test_missing_rich_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"pip install 'regard\[look\]'"):
        terminal([make_record(random_heads(2, 5, 5))], list("abcde"))
