"""The page of the layers: its snippets run, its shapes are true, its links lead somewhere, and its pictures are drawn."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import matplotlib
import pytest
import torch
from support.paths import ROOT

from regard import nn

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import draw_layers  # noqa: E402

PAGE = (DOCS / "layers.md").read_text()
INTRODUCTION, *_parts = re.split(r"(?m)^##+ (.+)\n", PAGE)
SECTIONS = dict(zip(_parts[::2], _parts[1::2], strict=True))
# What holds something, or is a part of the layers: a mention will do.
PARTS = {"Memory", "ComponentModule", "Gates"}


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def layers() -> list[str]:
    """All public names, as the headings have them."""
    found = [name for name in nn.__all__ if not isinstance(getattr(nn, name), ModuleType)]
    found += nn.vision.__all__
    found += ["recurrent.RecurrentEncoder", "recurrent.RecurrentDecoder", "recurrent.coverage_loss"]
    return [name for name in found if name not in PARTS]


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if snippets(text)])
def test_snippets_run_and_say_their_shapes(title: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippets(INTRODUCTION)[0], names)
    for code in snippets(SECTIONS[title]):
        exec(compile(code, f"layers.md, {title}", "exec"), names)
        # "out: (2, 10, 64)" in a comment
        told = re.findall(r"([\w.]+): (\([\d, ]*\))", " ".join(re.findall(r"(?m)^# .*", code)))
        assert told, "it tells no shape"
        for name, shape in told:
            assert str(tuple(eval(name, names).shape)) == shape, name


@pytest.mark.parametrize("name", layers())
def test_each_layer_has_its_section(name: str) -> None:
    [title] = [title for title in SECTIONS if name in title.split(", ")]
    text = SECTIONS[title]
    assert len(snippets(text)) == 1
    assert 3 <= len(snippets(text)[0].splitlines()) <= 8
    assert name.split(".")[-1] in snippets(text)[0]
    assert re.search(r"```\n.+?```", text, re.S), "no formula"
    assert re.search(r"Code:\s\[\w+\.py\]", text)


@pytest.mark.parametrize("name", [name for name in layers() if name != "replace_attention"])
def test_each_layer_names_the_source_of_its_docstring(name: str) -> None:
    """Its years, and its sections and equations, are those of the docstring."""
    thing: Any = nn.vision if name in nn.vision.__all__ else nn
    for part in name.split("."):
        thing = getattr(thing, part)
    [text] = [text for title, text in SECTIONS.items() if name in title.split(", ")]
    source = thing.__doc__.split("Source: ")[1].split(">>>")[0]
    told = text.split("Source: ")[1]
    facts = r"\d{4}|(?:section|equation|figure|appendix)s? [\w.]*\w"
    wanted = set(re.findall(facts, re.sub(r"\s+", " ", source)))
    # A decoder's coverage has a section of its own.
    wanted -= {"2017", "section 2.3"} if name == "recurrent.RecurrentDecoder" else set()
    assert wanted
    assert wanted <= set(re.findall(facts, re.sub(r"\s+", " ", told)))


def test_parts_are_mentioned() -> None:
    assert set(nn.__all__) | set(nn.vision.__all__) >= PARTS
    assert all(f"`{name}`" in PAGE for name in PARTS)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    assert {target for target in targets if target[0] == "#"} <= anchors
    assert all((DOCS / target.split("#")[0]).exists() for target in targets)


def test_each_picture_is_drawn_and_shown_once() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(layers/([\w.]+)\)", PAGE)
    files = list((DOCS / "layers").iterdir())
    assert sorted(shown) == sorted(file.name for file in files)
    assert {file.stem for file in files} == set(draw_layers.PICTURES)
    assert all(file.stat().st_size < 60_000 for file in files)


@pytest.mark.parametrize("name", draw_layers.PICTURES)
def test_pictures_can_be_drawn(name: str) -> None:
    """From the layers as they are now. The files are not compared: other versions of matplotlib write others."""
    torch.manual_seed(0)
    with matplotlib.rc_context(draw_layers.STYLE):
        assert draw_layers.PICTURES[name]().axes
