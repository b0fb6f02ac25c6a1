"""The language of the code base: private words that once stood for standard terms do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.paths import ROOT

# Identifiers, and what to say instead.
IDENTIFIERS = {
    "_Told": "PackedArgs, KernelArgs",
    "Told": "KernelArgs",
    "forward_told": "forward",
    "backward_told": "backward",
    "_told": "packed arguments",
    "is_wild": "is_nonfinite",
    "any_wild": "any_nonfinite",
    "pull_queries": "bwd_dq_kernel",
    "pull_keys": "bwd_dkv_kernel",
    "Pulled": "Grads",
    "Kept": "Saved",
    "Followed": "SoftmaxTracker",
    "Counted": "RefCountedPatch",
    "answered_by": "dispatch_to",
    "see_softmax": "on_softmax",
    "is_kept_by_others": "has_saved_tensor_hooks",
    "_is_left_to": "masks_nonfinite",
    "_AS_THEY_ARE": "_UNREDUCED_SCORES",
    "without_nonfinite": "zero_nonfinite",
    "bad_q": "nonfinite_q",
    "bad_k": "nonfinite_k",
    "EXTRAS": "saved",
    "empty_extras": "empty_saved",
    "Yardstick": "ErrorBudget",
    "turn_back": "transpose_back",
    "turn_queries": "load_queries",
    "by_pairs": "use_bf16_dot",
}
# Phrases, in any case.
PHRASES = (
    "is wild", "are wild", "what is wild", "what is told", "is told of", "are told of", "is told by", "as it is told",
    "what is asked for", "whole number", "nobody may", "whoever", "the house", "of its own making", "numbers a lane",
    "keys a block", "a label a word", "a label a text", "word of the vocabulary", "words of the vocabulary", "done straight",
    "so long is", "once more, with care", "the plain way",
)  # fmt: skip
SUFFIXES = (".py", ".cpp", ".h", ".js", ".css", ".html", ".md", ".toml", ".txt")
# Where old names stand by design: aliases, their tests, what changed, and this list.
EXEMPT = {"regard/deprecated.py", "tests/test_deprecated.py", "CHANGELOG.md", "tests/test_vocabulary.py"}

FILES = [
    path
    for folder in ("regard", "csrc", "frontend", "docs", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES and "node_modules" not in path.parts and path.name != "page.js"
] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "setup.py", "Makefile", "pyproject.toml")]
_IDENTIFIER = re.compile(r"(?<![\w])(" + "|".join(sorted(IDENTIFIERS, key=len, reverse=True)) + r")(?![\w])")
_PHRASE = re.compile(r"\b(" + "|".join(PHRASES) + r")\b", re.IGNORECASE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_uses_standard_terms(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in EXEMPT:
        return
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found += [f"{path}:{number}: {m[1]!r}; say {IDENTIFIERS[m[1]]}" for m in _IDENTIFIER.finditer(line)]
        found += [f"{path}:{number}: {m[1]!r}" for m in _PHRASE.finditer(line)]
    assert not found, "\n".join(found)


def test_class_names_are_unique() -> None:
    """One concept has one name: no two classes of the package share one."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "regard").rglob("*.py")):
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_names_of_tests_state_behavior() -> None:
    """`test_<unit>_<behavior>`: no names that are riddles."""
    riddle = re.compile(
        r"^def (test_(?:(?:it|they)_\w+|(?:\w+_)?(?:what|who|whom|nobody|everybody|told|knows|anew)(?:_\w+)?))\(", re.M
    )
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if (names := riddle.findall(path.read_text(encoding="utf-8")))
    }
    assert found == {}
