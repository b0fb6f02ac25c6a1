"""The plan of the house: nothing imports leftwards, nothing heavy comes along, and everything says what it is."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import regard
from regard import function, mask, nn, normalizer, position, rotary, score, summary

PACKAGE = Path(regard.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From left to right; what stands in one row knows nothing of the others there. A star is a package as a whole, whose
# parts may know each other.
LAYERS = [
    {"version", "tile", "word"},
    {"check"},
    {"rotary"},
    {"dropout", "score", "normalizer", "mask", "position", "summary"},
    {"function", "arguments"},
    {"problem", "merge"},
    {"kernels.equation", "kernels.relative"},
    {"kernels.strip"},
    {"kernels.reference", "kernels.tiled", "kernels.torch", "kernels.native"},
    {"kernels.cpu", "kernels.gpu.*"},
    {"kernels.differentiate"},
    {"kernels", "kernels.choose"},
    {"attention"},
    {"nn.*", "watch.*", "view.*"},
    {"models.*"},
    {"tasks.*"},
    {"look", "doctor", "demo"},
    {"look_at_image"},
    {"bench.*"},
    {"cli.*"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def place(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    parts = module.split(".")
    packages = [".".join(parts[: n + 1]) + ".*" for n in range(len(parts))]
    found = [name for name in (module, *packages) if name in RANK]
    assert found, f"regard.{module} has no place in the house yet: give it one in LAYERS"
    return found[0]


def imports(path: Path) -> set[str]:
    """All modules that a file imports, wherever in the file, by their whole names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("regard.") in MODULES}
            found |= modules | ({node.module or ""} if modules != inner else set())
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_nothing_imports_leftwards(module: str) -> None:
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] != "regard":
            continue
        assert imported != "regard", f"{module} imports the front door, and with it everything"
        other = imported.removeprefix("regard.")
        inside = place(other) == place(module)  # of a package: two modules have no place in common
        left = RANK[place(other)] < RANK[place(module)]
        assert left or inside, f"{module} imports {other}, which stands beside it or to the right"


def test_nothing_imports_in_a_circle() -> None:
    """Nor do the parts of a package."""
    edges = {
        name: {other.removeprefix("regard.") for other in imports(path)} & set(MODULES) - {name}
        for name, path in MODULES.items()
    }
    while edges:
        ends = [name for name, to in edges.items() if not to & set(edges)]
        assert ends, f"there is a circle among these: {sorted(edges)}"
        for name in ends:
            del edges[name]


@pytest.mark.parametrize("module", MODULES)
def test_the_core_needs_nothing_but_torch(module: str) -> None:
    bare = (
        module == "__init__" or place(module) in ("nn.*", "watch.*", "models.*") or RANK[place(module)] < RANK["nn.*"]
    )
    extras = {
        "nn.replace": {"transformers"}, "watch.store": {"safetensors"}, "watch.export": {"pandas"},
        "watch.rollout": {"scipy"},
    }.get(module, set())  # fmt: skip
    if module.startswith("kernels.gpu."):  # which are imported when there is Triton
        extras = {"triton"}
    top = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not bare or top <= set(sys.stdlib_module_names) | {"torch", "regard"} | extras


def test_import_brings_nothing_along() -> None:
    """What `import regard` loads besides `import torch`: itself, and parts of Python. Not even torch's compiler."""
    code = (
        "import sys, torch; before = set(sys.modules); import regard; new = set(sys.modules) - before;"
        "own = {'regard', *sys.stdlib_module_names};"
        "print(*sorted(name for name in new if name.split('.')[0] not in own))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.*"), *Path(__file__).parent.glob("*.py")], ids=lambda p: p.name)
def test_no_file_is_long(path: Path) -> None:
    if path.suffix in (".py", ".js", ".css", ".html", ".cpp", ".h"):
        assert len(path.read_text().splitlines()) <= 400


# Modules whose tests bear another name, because they are tested through what uses them.
TESTED_BY = {
    "__init__": "house",
    "arguments": "errors",
    "attention": "kernels",
    "check": "errors",
    "problem": "errors",
    "function": "errors",
    "normalizer": "kernels",
    "summary": "kernels",
    "tile": "mask",
    "word": "differentiate",
    "rotary": "position",
    "version": "house",
    "kernels.choose": "kernels",
    "kernels.equation": "kernels",
    "kernels.reference": "kernels",
    "kernels.strip": "kernels",
    "kernels.tiled": "kernels",
    "kernels.relative": "position",
    **{
        f"kernels.gpu{'.' * bool(part)}{part}": "gpu"
        for part in (
            "",
            "additive",
            "additive_backward",
            "arguments",
            "backward",
            "call",
            "dropout",
            "forward",
            "gather",
            "launch",
            "mask",
            "score",
            "serve",
            "top",
            "tuning",
            "weights",
        )
    },
    "look": "cli",
    "doctor": "cli",
    "demo": "cli",
    "bench.cases": "bench",
    "bench.cpu": "bench",
    "bench.error": "bench",
    "bench.goal": "bench",
    "bench.gpu": "bench_gpu",
    "bench.length": "bench",
    "bench.measure": "bench",
    "bench.peak": "bench",
    "bench.row": "bench",
    "bench.run": "bench",
    "bench.steps": "bench",
    "bench.table": "bench",
    "bench.watch": "bench",
    **{f"cli.{part}": "cli" for part in ("__main__", "app", "demo", "doctor", "look")},
    "models": "transformer",
    "models.classifier": "reader",
    "models.tagger": "reader",
    "nn": "house",
    "nn.encoder": "recurrent",
    **{f"nn.vision.{part}": "vision" for part in ("channel", "grid", "non_local", "patch", "self_attention", "window")},
    "nn.vision.pooling": "vision",
    "nn.vision.position": "vision",
    "tasks": "train",
    **{f"tasks.{part}": "train" for part in ("classify", "open", "tag", "task", "translate")},
    **{f"tasks.{part}": "predict" for part in ("presets", "pronounce")},
    "tasks.words": "reader",
    "watch.ask": "watch",
    "watch.compare": "head",
    "watch.counted": "readable",
    "watch.export": "watched",
    "watch.fast": "inside",
    "watch.intercept": "watch",
    "watch.join": "watched",
    "watch.record": "watch",
    "watch.store": "watched",
    "view": "page",
    "cli.serve": "serve",
    "view.brief": "page",
    "view.data": "page",
    "view.pack": "page",
    "view.record": "page",
    "view.token": "page",
}


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_its_tests(module: str) -> None:
    stem = TESTED_BY.get(module, module.split(".")[-1])
    assert (Path(__file__).parent / f"test_{stem}.py").exists()


def test_no_entry_has_outlived_its_module() -> None:
    assert set(TESTED_BY) <= set(MODULES)


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings.


def public(module: ModuleType) -> list[tuple[str, object]]:
    """The public classes and functions that a module defines."""
    return [
        (f"{module.__name__}.{name}", thing)
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]


WORDS = [pair for module in (score, function, normalizer, mask, position, rotary, summary) for pair in public(module)]
# (B, S), (H,), (), (..., L, width), (B|1, L), (b, h, l, s)
SHAPE = re.compile(r"\((?:(?:\.\.\.|[A-Za-z]\w*(?:\|1)?)(?:,[^()]*)?)?\)")


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are(module: str) -> None:
    if module != "version":
        assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


def test_public_names_say_what_they_are() -> None:
    for module in (regard, position, nn, nn.vision):
        for name in module.__all__:
            thing = getattr(module, name)
            assert isinstance(thing, str) or thing.__doc__, name


@pytest.mark.parametrize(("name", "thing"), WORDS, ids=[name for name, _ in WORDS])
def test_words_say_what_they_are_and_their_shapes(name: str, thing: object) -> None:
    doc = thing.__doc__ or ""
    assert doc
    assert not doc.startswith(f"{name.split('.')[-1]}("), "the signature is no docstring: that is what dataclasses put"
    if any("Tensor" in str(annotation) for annotation in inspect.get_annotations(thing).values()):
        assert SHAPE.search(doc), f"{name} has tensors, but its docstring names no shape"


CITED = [*score._SCORES.values(), *normalizer._NORMALIZERS.values(), *position._BIASES.values()]
CITED += [getattr(position, name) for name in position.__all__]
# Not those that hold something, or swap it, and compute nothing.
LAYERS_OF_ATTENTION = [
    layer
    for module in (nn, nn.vision, nn.recurrent)
    for name, layer in vars(module).items()
    if name in getattr(module, "__all__", ("RecurrentEncoder", "RecurrentDecoder", "coverage_loss"))
    and not isinstance(layer, ModuleType)
    and layer not in (nn.Memory, nn.Word, nn.replace_attention, nn.vision.Gates)
]
CITED += LAYERS_OF_ATTENTION


@pytest.mark.parametrize("thing", set(CITED), ids=lambda thing: thing.__name__)
def test_formulas_say_where_they_come_from(thing: type) -> None:
    if thing is position.alibi_slopes:
        thing = position.ALiBi
    assert re.search(r"Source: .*\d{4}", thing.__doc__ or "", re.DOTALL), "no source, with its year"


def test_methods_of_layers_say_what_they_take() -> None:
    for layer in (position.Rotary, position.Learned, *LAYERS_OF_ATTENTION):
        if not isinstance(layer, type) or not issubclass(layer, torch.nn.Module):
            continue
        assert SHAPE.search((layer.forward.__doc__ or "") + (layer.__doc__ or ""))
