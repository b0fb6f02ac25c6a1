"""What tests of the native CPU backend share."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck
from support.problems import Problem

import regard
from regard.backends.cpu import extension

# The instruction sets of this machine.
SETS = extension.instructions()
# What the native backend takes, for random problems.
NATIVE = {
    "score": ("scaled_dot", "dot", "cosine", "bilinear", "gaussian", "distance", "additive"),
    "normalizer": ("softmax", "softmax", "sigmoid", "sparsemax", "entmax"),
    "dtype": (torch.float32, torch.float32, torch.bfloat16, torch.float16),
    "summary": (None, None, "lse", "all"),
}
# The settings of Hypothesis.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def why_not(problem: Problem) -> str | None:
    """Why the native backend does not take a problem, or None."""
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.ask(leaves)).reasons["cpu"]
