"""List all components with what they compute, and the backends that support them: `python docs/list_components.py` rewrites
`docs/components.md`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from regard.backends.backend import Backend
from regard.backends.registry import BACKENDS
from regard.components import mask, normalizer, position, score
from regard.components.statistic import BUILT_IN, Statistic
from regard.components.summary import Summary
from regard.plan.assemble import make_problem
from regard.plan.problem import Problem

PAGE = Path(__file__).parent / "components.md"
# Backends that support some components only; `tiled` and `reference` compute all of them.
PARTIAL = [name for name, backend in BACKENDS.items() if backend.supported is not None]
MASKS: dict[str, Any] = {
    "causal": mask.causal(),
    "window": mask.window(2, 1),
    "lengths": mask.lengths([3, 4]),
    "packed": mask.packed(torch.tensor([0, 2, 4])),
    "prefix": mask.prefix(2),
    "documents": mask.documents(torch.tensor([0, 0, 1, 1])),
    "blocks": mask.blocks(torch.tensor([[True, False], [True, True]]), 2),
    "dense": mask.dense(torch.ones(4, 4).bool().tril()),
    "where": mask.where(lambda batch, head, query, key: query >= key),
}
INTRODUCTION = """# Components

The configurable parts of a call, with what each computes. Their documentation, with arguments, sources and examples, is in
their docstrings: `help(regard.score.Cosine)`. How to add one of your own: [CONTRIBUTING](../CONTRIBUTING.md).

The last column names the backends with kernels for a component. `tiled` computes all components, in linear memory, on any
device.
This page is written by `python docs/list_components.py`.
"""


def write() -> str:
    """Return the page."""
    return INTRODUCTION + "".join(f"\n## {title}\n\n{table}" for title, table in _tables())


def _tables() -> Iterator[tuple[str, str]]:
    scores = {kind.__name__: {"score": kind.example(2, 8)} for kind in score._SCORES.values()}
    docs: dict[str, Any] = {kind.__name__: kind for kind in score._SCORES.values()}
    yield "Scores: `regard.score`", _components(scores, docs)
    docs = {kind.__name__: kind for kind in normalizer._NORMALIZERS.values()}
    yield "Normalizers: `regard.normalizer`", _components({n: {"normalizer": kind()} for n, kind in docs.items()}, docs)
    masks = {name: {"mask": MASKS[name]} for name in mask._MASKS}
    yield "Masks: `regard.mask`", _components(masks, mask._MASKS)
    docs = {kind.__name__: kind for kind in position._BIASES.values()}
    yield "Position biases: `regard.position`", _components({n: {"bias": docs[n].example(2)} for n in docs}, docs)
    yield "Statistics: `regard.Summary`", _statistics()


def _components(examples: dict[str, dict[str, Any]], docs: dict[str, Any]) -> str:
    rows = ["| name | computes | kernels |", "|---|---|---|"]
    for name, arguments in examples.items():
        first = " ".join(inspect.cleandoc(docs[name].__doc__).split("\n\n")[0].split())
        rows.append(f"| `{name}` | {_escape(first)} | {_backends(**arguments)} |")
    return "\n".join(rows) + "\n"


def _backends(**arguments: Any) -> str:
    """Return the backends that support a component."""
    q = torch.zeros(2, 2, 4, 8)
    names = ("score", "normalizer", "mask", "bias", "softcap", "dropout", "seed", "summary")
    problem = make_problem(q, q, q, *[arguments.get(name, 0.0 if name == "dropout" else None) for name in names])
    return ", ".join(f"`{name}`" for name in PARTIAL if _is_supported(BACKENDS[name], problem))


def _is_supported(backend: Backend, problem: Problem) -> bool:
    """Whether a backend takes a component. What else a GPU needs cannot be asked here."""
    if backend.supported is None or backend.supported.refuse(problem.plan) is not None:
        return False
    return not backend.is_for("cpu") or backend.refuse(problem.plan, problem.tensors) is None


def _statistics() -> str:
    fields = dict(re.findall(r"(?ms)^    (\w+): (.+?)(?=^    \w+: |\n\n|\Z)", inspect.cleandoc(Summary.__doc__ or "")))
    rows = [
        "| name | computes | shape | of queries that may attend to no key | gradient | `merge` |",
        "|---|---|---|---|---|---|",
    ]
    for kind in BUILT_IN:
        field = kind.name.split("_")[0]
        name = f"`{field}`" if kind.name == field else f"`{kind.name.replace('_', '.')}`"
        text = _escape(" ".join(fields[field].split()))
        empty = "-inf" if kind.empty == -math.inf else f"{kind.empty:g}"
        gradient = "yes" if kind.dtype is None else "no"
        merges = "no" if kind.merge is Statistic.merge else "yes"
        rows.append(f"| {name} | {text} | ({', '.join(kind.axes)}) | {empty} | {gradient} | {merges} |")
    return "\n".join(rows) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
