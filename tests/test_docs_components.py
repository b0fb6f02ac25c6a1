"""docs/components.md is what its script writes; the table of components in the README is complete."""

from __future__ import annotations

import re
import sys

import pytest
from support.paths import ROOT

from regard.backends.cpu import extension
from regard.components import mask, normalizer, position, score
from regard.components.statistic import BUILT_IN

sys.path.insert(0, str(ROOT / "docs"))
import list_components


@pytest.mark.skipif(extension.missing is not None, reason="the page lists what the native kernels support")
def test_page_of_components_is_up_to_date() -> None:
    expected = "python docs/list_components.py writes it"
    assert list_components.PAGE.read_text(encoding="utf-8") == list_components.write(), expected


def test_readme_lists_all_components() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [row] = re.findall(
        r"\| scores \| normalizers \| masks \| positions \| summaries \|\n\|[-|]+\|\n\| (.+) \|\n", readme
    )
    # Not at the bars within code, which are escaped.
    scores, normalizers, masks, positions, statistics = (set(re.findall(r"`(\w+)`", cell)) for cell in row.split(" | "))
    assert scores == {kind.__name__ for kind in score._SCORES.values()}
    assert normalizers == {kind.__name__ for kind in normalizer._NORMALIZERS.values()}
    assert masks == set(mask._MASKS)
    assert positions >= {kind.__name__ for kind in position._BIASES.values()}
    assert statistics == {kind.name.split("_")[0] for kind in BUILT_IN}
