"""The recipes of CONTRIBUTING.md, as they stand there: scripts run, edits are made in a copy of the tree, kernels are built.

Each toy component is compared with its formula in float64.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, mask

ROOT = Path(__file__).parents[1]


class Block(NamedTuple):
    """A block of code: a script, or an edit of a file: a new one, or lines before, after or at the end of others."""

    code: str
    path: str | None = None
    where: str = ""
    anchor: str = ""


def _read_recipes() -> dict[str, list[Block]]:
    """Return the blocks of each recipe, by its title."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Recipes\n")[1].split("\n## ")[0]
    recipes: dict[str, list[Block]] = {}
    for section in text.split("\n### ")[1:]:
        title, _, body = section.partition("\n")
        recipes[title], end = [], 0
        for fence in re.finditer(r"^( *)```(?:python|cpp)\n(.*?)^\1```$", body, re.MULTILINE | re.DOTALL):
            prose = " ".join(body[end : fence.start()].split())
            code = re.sub(rf"^{fence[1]}", "", fence[2], flags=re.MULTILINE)
            edit = re.search(r"`([\w/]+\.\w+)`, (?:(before|after) `([^`]+)`|(at the end)|(a new file)):$", prose)
            where = "" if edit is None else edit[2] or edit[4] or edit[5]
            recipes[title].append(Block(code) if edit is None else Block(code, edit[1], where, edit[3] or ""))
            end = fence.end()
    return recipes


def _edit(block: Block, tree: Path) -> None:
    """Make an edit in a copy of the tree. Its anchor is a whole line, which occurs once in the file."""
    assert block.path is not None
    file = tree / block.path
    lines = [] if block.where == "a new file" else file.read_text().splitlines(keepends=True)
    at = len(lines)
    if block.anchor:
        hits = [i for i, line in enumerate(lines) if " ".join(line.rstrip("\\\n").split()) == block.anchor]
        assert len(hits) == 1, f"{block.path} has {len(hits)} lines {block.anchor!r}; expected one"
        at = hits[0] + (block.where == "after")
    file.write_text("".join([*lines[:at], block.code, *lines[at:]]))


_RECIPES = _read_recipes()
_NATIVE = [title for title in _RECIPES if "native" in title]
_INSIDE = [title for title in _RECIPES if title not in _NATIVE and any(block.path for block in _RECIPES[title])]
_OUTSIDE = [title for title in _RECIPES if title not in _NATIVE + _INSIDE]


def test_every_extension_has_a_recipe() -> None:
    titles = " ".join(_RECIPES).lower()
    for extension in ("score", "normalizer", "mask", "bias", "statistic", "backend", "layer", "task", "native"):
        assert extension in titles
    assert all(_RECIPES.values())
    assert {block.path for title in _NATIVE for block in _RECIPES[title]} == {
        "regard/components/predicate.py", "csrc/problem.h", "csrc/mask.h", "regard/backends/triton/mask.py",
        "regard/components/statistic.py", "regard/components/summary.py", "csrc/weight_summaries.h",
    }  # fmt: skip


@pytest.mark.parametrize("title", _OUTSIDE)
def test_script_runs_outside_of_the_package(title: str) -> None:
    """The script runs; a component equals its formula, forward and backward, on every backend that computes any component."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "recipe"}
    module = type(sys)("recipe")
    sys.modules["recipe"] = module  # dataclasses look it up
    try:
        for block in _RECIPES[title]:
            exec(compile(block.code, f"CONTRIBUTING.md: {title}", "exec"), names)
    finally:
        del sys.modules["recipe"]
    if title in _FORMULAS:
        _compare(*_FORMULAS[title](names))


_B, _H, _L, _S = 2, 4, 67, 131
_BEHIND = torch.arange(_L)[:, None] - torch.arange(_S)


def _dots(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


# For each recipe of a component: the arguments of a call, and the weights by the formula, in float64.
_FORMULAS: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]]] = {
    "A score": lambda names: (
        {"score": names["Manhattan"]()},
        lambda q, k: (-(q[..., None, :] - k[..., None, :, :]).abs().sum(-1)).softmax(-1),
    ),
    "A normalizer": lambda names: (
        {"normalizer": names["SquaredReLU"]()},
        lambda q, k: torch.nn.functional.normalize(_dots(q, k).relu().square(), p=1.0, dim=-1),
    ),
    "A mask": lambda names: (
        {"mask": names["Dilated"](3) & mask.causal("start")},
        lambda q, k: _dots(q, k).masked_fill((_BEHIND % 3 != 0) | (_BEHIND < 0), -math.inf).softmax(-1),
    ),
    "A bias": lambda names: (
        {"bias": names["LogDistance"](torch.tensor(0.5))},
        lambda q, k: (_dots(q, k) - 0.5 * (_BEHIND + _S - _L).abs().log1p()).softmax(-1),
    ),
    "A statistic of the weights": lambda names: (
        {"summary": Summary(other=(names["Collision"](),))},
        lambda q, k: _dots(q, k).softmax(-1),
    ),
}


def _compare(arguments: dict[str, Any], weights: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compare a call and its gradients with the formula."""
    leaves = [torch.randn(_B, _H, n, 8, dtype=torch.float64, requires_grad=True) for n in (_L, _S, _S)]
    p = weights(*leaves[:2])
    exact = [p @ leaves[2]]
    if "summary" in arguments:
        exact.append(p.square().sum(-1))
    cotangents = [torch.randn_like(x) for x in exact]
    gradients = torch.autograd.grad(exact, leaves, cotangents)
    reasons = regard.explain(*[x.float() for x in leaves], **arguments).reasons
    served = [name for name, reason in reasons.items() if reason is None]
    assert {"tiled", "reference"} <= set(served)
    for name in served:
        floats = [x.detach().float().requires_grad_() for x in leaves]
        result = regard.attention(*floats, **arguments, backend=name)
        outputs = [result] if isinstance(result, Tensor) else [result[0], result[1].other["collision"]]
        found = torch.autograd.grad(outputs, floats, [x.float() for x in cotangents])
        for got, expected in zip((*outputs, *found), (*exact, *gradients), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_relative_bias_of_a_user_runs_on_native_kernels() -> None:
    names: dict[str, Any] = {}
    exec(_RECIPES["A bias"][0].code, names)
    bias = names["LogDistance"](torch.tensor(0.5, requires_grad=True))
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 13, 8)
    gradients = {}
    for backend in ("cpu", "reference"):
        out = regard.attention(q, k, k, bias=bias, backend=backend)
        gradients[backend] = torch.autograd.grad(out.square().sum(), bias.scale)[0]
    torch.testing.assert_close(gradients["cpu"], gradients["reference"], rtol=1e-4, atol=1e-5)


def _copy(folder: Path) -> Path:
    """Copy what is needed to build and to import the package."""
    for name in ("regard", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def _run(tree: Path, code: str, **environment: str) -> str:
    """Run a script with the package of a tree."""
    assert code
    path = os.pathsep.join([str(tree), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("title", _INSIDE)
def test_edits_add_to_the_package(title: str, tmp_path: Path) -> None:
    """The edits are made in a copy, in which the scripts run."""
    tree, script = _copy(tmp_path), ""
    first, *rest = _RECIPES[title]
    for block in (first, *rest):
        if block.path is None:
            script += block.code
        else:
            _edit(block, tree)
    check = """
expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
assert regard.__file__.startswith(TREE)
"""
    _run(tree, f"TREE = {str(tree)!r}\n" + script + check)


def test_native_edits_apply(tmp_path: Path) -> None:
    """The slow test below builds and runs what this one only applies."""
    tree = _copy(tmp_path)
    for title in _NATIVE:
        for block in _RECIPES[title]:
            _edit(block, tree)
            assert block.path is not None
            if block.path.endswith(".py"):
                compile((tree / block.path).read_text(), block.path, "exec")


_NATIVE_MASK = """
import math, torch, regard
from regard.components.predicate import Dilated

torch.manual_seed(0)
B, H, L, S, D = 2, 4, 197, 331, 16
behind = torch.arange(L)[:, None] - torch.arange(S)
for step in (1, 3, 70):
    for of, allowed in (
        (Dilated(step), behind % step == 0),
        (regard.mask.causal("start") & ~Dilated(step), (behind % step != 0) & (behind >= 0)),
    ):
        leaves = [torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True) for n in (L, S, S)]
        s = (leaves[0] @ leaves[1].mT / math.sqrt(D)).masked_fill(~allowed, -math.inf)
        p = torch.where(allowed.any(-1, keepdim=True), s, 0.0).softmax(-1) * allowed
        out = p @ leaves[2]
        cotangent = torch.randn_like(out)
        exact = (out, *torch.autograd.grad(out, leaves, cotangent))
        floats = [x.detach().float().requires_grad_() for x in leaves]
        out = regard.attention(*floats, mask=of, backend=BACKEND)
        for got, expected in zip((out, *torch.autograd.grad(out, floats, cotangent.float())), exact):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
"""

_NATIVE_STATISTIC = """
import torch, regard
from regard import mask, normalizer

torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 197, 16), torch.randn(2, 2, 331, 16), torch.randn(2, 2, 331, 16)
request = regard.Summary(collision=True, lse=True, top=2, rows=[0])
for change in ({}, {"mask": mask.causal("end")}, {"normalizer": normalizer.Entmax(1.5)}, {"normalizer": normalizer.Sigmoid()}):
    assert regard.explain(q, k, v, summary=request, **change).chosen == "cpu"
    found = regard.attention(q, k, v, summary=request, **change)[1]
    exact = regard.attention(q.double(), k.double(), v.double(), summary=regard.Summary(full=True), **change)[1].full
    torch.testing.assert_close(found.collision.double(), exact.square().sum(-1), rtol=1e-5, atol=1e-6)
    few = regard.attention(q[:, :, :1], k, v, summary=request)[1].collision
    traced = torch.compile(lambda *x: regard.attention(*x, summary=request, **change)[1].collision, backend="aot_eager")
    torch.testing.assert_close(traced(q, k, v), found.collision)
assert regard.explain(q, k, v, summary=request).reasons["triton"] is not None
leaf = q.clone().requires_grad_()
regard.attention(leaf, k, v, summary=request)[1].collision.sum().backward()
assert leaf.grad.abs().sum() > 0
"""


@pytest.mark.slow
def test_native_recipes_build_and_match_formula(tmp_path: Path) -> None:
    """All edits are made in one copy, which is built once."""
    tree = _copy(tmp_path)
    for title in _NATIVE:
        for block in _RECIPES[title]:
            _edit(block, tree)
    (tree / "regard" / "_native.abi3.so").unlink(missing_ok=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
    for instructions in _run(
        tree, "from regard.backends.cpu import extension; print(*extension.instructions())"
    ).split():
        _run(tree, "BACKEND = 'cpu'" + _NATIVE_MASK, REGARD_INSTRUCTIONS=instructions)
        _run(tree, _NATIVE_STATISTIC, REGARD_INSTRUCTIONS=instructions)
    _run(tree, "BACKEND = 'triton'" + _NATIVE_MASK.replace("197, 331", "37, 43"), TRITON_INTERPRET="1")
