"""The structure of the package: layers of imports, light imports, short files, mirrored tests, docstrings."""

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
from support.paths import ROOT

import regard
from regard import mask, nn, normalizer, position, score, summary
from regard.components import function, predicate, rotary

PACKAGE = Path(regard.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the lowest layer to the highest. A module imports from lower layers only, and from none in its own row. A star stands for
# a package, whose modules may import each other.
LAYERS = [
    {
        "version",
        "tracing",
        "on_import",
        "error_text",
        "components",
        "components.component",
        "components.tile",
        "components.graph",
        "components.tensor_ops",
        "plan",
        "backends",
        "backends.machine",
    },
    {"check", "deprecated", "files", "components.serialization"},
    {"components.rotary", "components.predicate", "components.learned_entmax"},
    {"components.score", "components.normalizer", "components.mask", "components.position"},
    {"components.statistic"},
    {"components.summary"},
    {"components.function"},
    {"components.part"},
    {"plan.arguments", "plan.problem"},
    {"plan.nonfinite", "plan.cache", "merge", "nested"},
    {"plan.assemble"},
    {"backends.backend", "backends.dropout", "backends.relative"},
    {"backends.equation"},
    {"backends.reference", "backends.sdpa", "backends.tiled.*"},
    {"backends.cpu.*", "backends.triton.*"},
    {"backends.autograd", "backends.registry", "backends.plan_text"},
    {"backends.functions"},
    {"backends.compiled_ops"},
    {"backends.choose", "backends.flops"},
    {"attention"},
    {"nn.*", "watch.*", "view.*", "distributed.*"},
    {"library"},
    {"models.*"},
    {"tasks.*"},
    {"apps.*"},
    {"bench.*"},
    {"cli.*"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def place(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    parts = module.split(".")
    packages = [".".join(parts[: n + 1]) + ".*" for n in range(len(parts))]
    found = [name for name in (module, *packages) if name in RANK]
    assert found, f"regard.{module} has no layer yet: give it one in LAYERS"
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
def test_modules_import_lower_layers_only(module: str) -> None:
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] != "regard":
            continue
        assert imported != "regard", f"{module} imports the package itself, and with it everything"
        other = imported.removeprefix("regard.")
        inside = place(other) == place(module)  # of a package: two modules have no place in common
        left = RANK[place(other)] < RANK[place(module)]
        assert left or inside, f"{module} imports {other}, which is in its own layer or a higher one"


def test_imports_are_acyclic() -> None:
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
def test_core_depends_on_torch_alone(module: str) -> None:
    bare = (
        module == "__init__" or place(module) in ("nn.*", "watch.*", "models.*") or RANK[place(module)] < RANK["nn.*"]
    )
    extras = {
        "nn.replace": {"transformers"}, "nn.transformers": {"transformers"}, "watch.recording.store": {"safetensors"},
        "watch.recording.export": {"pandas"}, "watch.analysis.rollout": {"scipy"},
    }.get(module, set())  # fmt: skip
    if module.startswith("backends.triton."):  # which are imported when there is Triton
        extras = {"triton"}
    top = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not bare or top <= set(sys.stdlib_module_names) | {"torch", "regard"} | extras


def test_import_loads_no_other_package() -> None:
    """What `import regard` loads besides `import torch`: itself, and parts of Python. Not even torch's compiler."""
    code = (
        "import sys, torch; before = set(sys.modules); import regard; new = set(sys.modules) - before;"
        "own = {'regard', *sys.stdlib_module_names};"
        "print(*sorted(name for name in new if name.split('.')[0] not in own))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.*"), *Path(__file__).parent.glob("*.py")], ids=lambda p: p.name)
def test_files_are_short(path: Path) -> None:
    if path.suffix in (".py", ".js", ".css", ".html", ".cpp", ".h"):
        assert len(path.read_text().splitlines()) <= 400


TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}), ids=lambda p: p.name
)
def test_every_package_has_a_folder_of_tests(folder: Path) -> None:
    mirrored = TESTS / folder.relative_to(PACKAGE)
    assert [*mirrored.glob("test_*.py")] or [*mirrored.parent.glob("test_*.py")], f"{mirrored} holds no tests"


def test_folders_of_tests_mirror_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path()}
    assert [folder for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_tests_of_a_module_stand_in_its_folder() -> None:
    """A test file with the name of one module stands where that module does."""
    stems: dict[str, set[Path]] = {}
    for path in MODULES.values():
        stem = path.parent.name if path.stem == "__init__" else path.stem
        stems.setdefault(stem, set()).add(path.parent.relative_to(PACKAGE))
    for path in TESTS.rglob("test_*.py"):
        folders, own = stems.get(path.stem.removeprefix("test_"), set()), path.parent.relative_to(TESTS)
        assert not folders or any(own == folder or own in folder.parents for folder in folders), path


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


WORDS = [
    pair
    for module in (score, function, normalizer, predicate, mask, position, rotary, summary)
    for pair in public(module)
]
# (B, S), (H,), (), (..., L, width), (B|1, L), (b, h, l, s)
SHAPE = re.compile(r"\((?:(?:\.\.\.|[A-Za-z]\w*(?:\|1)?)(?:,[^()]*)?)?\)")


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_docstrings(module: str) -> None:
    if module != "version":
        assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


def test_public_names_have_docstrings() -> None:
    for module in (regard, position, nn, nn.vision):
        for name in module.__all__:
            thing = getattr(module, name)
            assert isinstance(thing, str) or thing.__doc__, name


@pytest.mark.parametrize(("name", "thing"), WORDS, ids=[name for name, _ in WORDS])
def test_components_document_shapes(name: str, thing: object) -> None:
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
    and layer not in (nn.Memory, nn.ComponentModule, nn.replace_attention, nn.register, nn.vision.Gates)
]
CITED += LAYERS_OF_ATTENTION


@pytest.mark.parametrize("thing", list(dict.fromkeys(CITED)), ids=lambda thing: thing.__name__)
def test_formulas_cite_their_source(thing: type) -> None:
    if thing is position.alibi_slopes:
        thing = position.ALiBi
    assert re.search(r"Source: .*\d{4}", thing.__doc__ or "", re.DOTALL), "no source, with its year"


def test_forward_methods_document_shapes() -> None:
    for layer in (position.Rotary, position.Learned, *LAYERS_OF_ATTENTION):
        if not isinstance(layer, type) or not issubclass(layer, torch.nn.Module):
            continue
        assert SHAPE.search((layer.forward.__doc__ or "") + (layer.__doc__ or ""))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "csrc/README.md"])
def test_pages_name_existing_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    names = set(re.findall(r"`([\w/.]+(?:\.(?:py|h|cpp|md|js)|/))`", tables))
    known = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*")
        if not {".venv", "node_modules", "build"} & {*path.parts}
    ]
    missing = [name for name in names if not any(f"/{path}".endswith(f"/{name.rstrip('/')}") for path in known)]
    assert names and not missing
