"""Calls with various components, forward and backward, for tests of threads and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score


def python_calls() -> list[Callable[[], list[Tensor]]]:
    """Return eight different calls of the backends in Python, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    configs: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Additive(torch.randn(6, generator=generator))},
        {"normalizer": normalizer.Entmax(1.5), "mask": mask.window(9, 9)},
        {"score": score.Distance(), "softcap": 2.0},
        {"score": lambda q, k: torch.sin(q @ k.mT)},
        {"dropout": 0.5, "seed": 3, "mask": mask.where(lambda b, h, i, j: (i + j) % 3 > 0)},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(100, generator=generator)},
    ]

    return [make_call(config, "reference" if i == 2 else "tiled", i) for i, config in enumerate(configs)]


def native_calls() -> list[Callable[[], list[Tensor]]]:
    """Return eight different calls of the native backend, with sequences long enough for every thread."""
    generator = torch.Generator().manual_seed(1)
    configs: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Gaussian(1.5)},
        {"score": score.Distance(), "mask": mask.window(90, 9)},
        {"softcap": 2.0, "bias": position.ALiBi()},
        {"normalizer": normalizer.Softmax(sink=0.5), "mask": mask.lengths(torch.tensor([300, 77]))},
        {"dropout": 0.5, "seed": 3},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(300, generator=generator)},
    ]
    return [make_call(config, "cpu", i, 300) for i, config in enumerate(configs)]


def make_call(arguments: dict[str, Any], backend: str, seed: int, length: int = 100) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 3, length, 6, generator=generator) for _ in range(3)]

    def run() -> list[Tensor]:
        x = [y.clone().requires_grad_() for y in inputs]
        with regard.record_backends() as ran:
            answer = regard.attention(*x, backend=backend, **arguments)
        assert ran == [backend]
        out = answer if isinstance(answer, Tensor) else answer[0]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    return run
