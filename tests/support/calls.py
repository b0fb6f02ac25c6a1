"""Calls of many kinds, forward and backward, for tests of threads and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score


def plain_calls() -> list[Callable[[], list[Tensor]]]:
    """Eight different calls, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    words: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Additive(torch.randn(6, generator=generator))},
        {"normalizer": normalizer.Entmax(1.5), "mask": mask.window(9, 9)},
        {"score": score.Distance(), "softcap": 2.0},
        {"score": lambda q, k: torch.sin(q @ k.mT)},
        {"dropout": 0.5, "seed": 3, "mask": mask.where(lambda b, h, i, j: (i + j) % 3 > 0)},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(100, generator=generator)},
    ]

    return [make_call(word, "reference" if i == 2 else "tiled", i) for i, word in enumerate(words)]


def native_calls() -> list[Callable[[], list[Tensor]]]:
    """The same by the native kernels, long enough for every thread."""
    generator = torch.Generator().manual_seed(1)
    words: list[dict[str, Any]] = [
        {},
        {"mask": mask.causal(), "summary": Summary(lse=True, entropy=True, top=3, received=True)},
        {"score": score.Gaussian(1.5)},
        {"score": score.Distance(), "mask": mask.window(90, 9)},
        {"softcap": 2.0, "bias": position.ALiBi()},
        {"normalizer": normalizer.Softmax(sink=0.5), "mask": mask.lengths(torch.tensor([300, 77]))},
        {"dropout": 0.5, "seed": 3},
        {"normalizer": normalizer.Sigmoid(-1.0), "bias": torch.randn(300, generator=generator)},
    ]
    return [make_call(word, "cpu", i, 300) for i, word in enumerate(words)]


def make_call(word: dict[str, Any], kernel: str, seed: int, length: int = 100) -> Callable[[], list[Tensor]]:
    own = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 3, length, 6, generator=own) for _ in range(3)]

    def run() -> list[Tensor]:
        x = [y.clone().requires_grad_() for y in inputs]
        with regard.record_backends() as ran:
            answer = regard.attention(*x, backend=kernel, **word)
        assert ran == [kernel]
        out = answer if isinstance(answer, Tensor) else answer[0]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    return run
