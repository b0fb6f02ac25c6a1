"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from test_structure import MODULES

import regard

# Packages and modules whose examples are held to what they print.
CHECKED: tuple[str, ...] = (
    "apps",
    "attention",
    "backends.triton",
    "bench",
    "components",
    "merge",
    "models",
    "nn",
    "plan",
    "tasks",
    "view",
    "watch",
)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _examples() -> list[doctest.DocTest]:
    names = {"torch": torch, "regard": regard, "nn": torch.nn, "F": torch.nn.functional}
    names |= {name: getattr(regard, name) for name in ("mask", "normalizer", "position", "score", "summary", "Summary")}
    found = []
    for module in MODULES:
        if any(module == checked or module.startswith(f"{checked}.") for checked in CHECKED):
            loaded = importlib.import_module(f"regard.{module}")
            found += doctest.DocTestFinder(exclude_empty=True).find(loaded, extraglobs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("test", _examples(), ids=lambda test: test.name)
def test_example(test: doctest.DocTest) -> None:
    torch.manual_seed(0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=_FLAGS).run(test, out=report.append)
    assert not report, "".join(report)
