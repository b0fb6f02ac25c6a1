"""docs/layers.md: snippets run with the documented shapes, links resolve, and pictures can be drawn."""

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
# Helpers, which are mentioned without a section of their own.
PARTS = {"Memory", "ComponentModule", "Gates", "register"}


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def layers() -> list[str]:
    """Return all public names, as in the headings."""
    found = [name for name in nn.__all__ if not isinstance(getattr(nn, name), ModuleType)]
    found += nn.vision.__all__
    found += ["recurrent.RecurrentEncoder", "recurrent.RecurrentDecoder", "recurrent.coverage_loss"]
    return [name for name in found if name not in PARTS]


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if snippets(text)])
def test_snippets_run_with_documented_shapes(title: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippets(INTRODUCTION)[0], names)
    for code in snippets(SECTIONS[title]):
        exec(compile(code, f"layers.md, {title}", "exec"), names)
        # "out: (2, 10, 64)" in a comment
        documented = re.findall(r"([\w.]+): (\([\d, ]*\))", " ".join(re.findall(r"(?m)^# .*", code)))
        assert documented, "no shape is documented"
        for name, shape in documented:
            assert str(tuple(eval(name, names).shape)) == shape, name


@pytest.mark.parametrize("name", layers())
def test_each_layer_has_a_section(name: str) -> None:
    [title] = [title for title in SECTIONS if name in title.split(", ")]
    text = SECTIONS[title]
    assert len(snippets(text)) == 1
    assert 3 <= len(snippets(text)[0].splitlines()) <= 8
    assert name.split(".")[-1] in snippets(text)[0]
    assert re.search(r"```\n.+?```", text, re.S), "no formula"
    assert re.search(r"Code:\s\[\w+\.py\]", text)


@pytest.mark.parametrize("name", [name for name in layers() if name != "replace_attention"])
def test_sections_cite_sources_of_docstrings(name: str) -> None:
    """Years, sections and equations match those of the docstring."""
    thing: Any = nn.vision if name in nn.vision.__all__ else nn
    for part in name.split("."):
        thing = getattr(thing, part)
    [text] = [text for title, text in SECTIONS.items() if name in title.split(", ")]
    source = thing.__doc__.split("Source: ")[1].split(">>>")[0]
    documented = text.split("Source: ")[1]
    facts = r"\d{4}|(?:section|equation|figure|appendix)s? [\w.]*\w"
    wanted = set(re.findall(facts, re.sub(r"\s+", " ", source)))
    # The coverage of a decoder has a section of its own.
    wanted -= {"2017", "section 2.3"} if name == "recurrent.RecurrentDecoder" else set()
    assert wanted
    assert wanted <= set(re.findall(facts, re.sub(r"\s+", " ", documented)))


def test_helper_classes_are_mentioned() -> None:
    assert set(nn.__all__) | set(nn.vision.__all__) >= PARTS
    assert all(f"`{name}`" in PAGE for name in PARTS)


def test_links_resolve() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    assert {target for target in targets if target[0] == "#"} <= anchors
    assert all((DOCS / target.split("#")[0]).exists() for target in targets)


def test_each_picture_is_shown_once() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(layers/([\w.]+)\)", PAGE)
    files = list((DOCS / "layers").iterdir())
    assert sorted(shown) == sorted(file.name for file in files)
    assert {file.stem for file in files} == set(draw_layers.PICTURES)
    assert all(file.stat().st_size < 60_000 for file in files)


@pytest.mark.parametrize("name", draw_layers.PICTURES)
def test_pictures_draw_without_errors(name: str) -> None:
    """Pictures are drawn from the current layers. Files are not compared, as they depend on the matplotlib version."""
    torch.manual_seed(0)
    with matplotlib.rc_context(draw_layers.STYLE):
        assert draw_layers.PICTURES[name]().axes
