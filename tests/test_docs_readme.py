"""The READMEs in English and Chinese: their code runs, is the same in both, and so are their figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.paths import ROOT

import regard

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def _code(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, without comments."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [re.sub(r" *#.*", "", block) for block in blocks]


def test_code_of_calls_and_layers_runs() -> None:
    model = torch.nn.TransformerEncoderLayer(64, 4)
    names: dict[str, Any] = {"model": model}
    calls, watching, layers = _code(README, "python")
    exec(calls, names)
    assert names["summary"].top.weights.shape == (2, 8, 1000, 8)
    assert names["summary"].received.shape == (2, 8, 1000)
    exec(layers, names)
    assert isinstance(model.self_attn, regard.nn.MultiheadAttention)
    assert "with regard.watch(model) as recording:" in watching


@pytest.mark.parametrize("language", ["python", "sh"])
def test_chinese_readme_has_the_same_code(language: str) -> None:
    def mended(text: str) -> str:
        return text.replace('"任意文本" --model bert-base-chinese', '"Any text" --model gpt2')

    assert [mended(block) for block in _code(CHINESE, language)] == _code(README, language)


def test_chinese_readme_has_the_same_figures() -> None:
    def figures(text: str) -> list[str]:
        rows = re.findall(r"^\|.*?\| (?:\d.*)\|$", text, re.MULTILINE)
        return [figure for row in rows for figure in re.findall(r"[\d.]+ : [\d.]+|\*\*[\d.]+x\*\*", row)]

    assert figures(README)
    assert figures(CHINESE) == figures(README)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_links_of_readme_resolve(text: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
