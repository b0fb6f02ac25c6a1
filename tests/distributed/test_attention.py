"""Attention over shards equals attention in one process: on threads for any number of ranks, and on processes."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from support.problems import Problem, problems
from torch import Tensor

import regard
from regard.distributed import SequenceShards, attention
from regard.distributed.layout import LAYOUTS
from regard.distributed.transport import ThreadTransport, run_ranks


def whole(problem: Problem) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the outputs and the gradients of all tensors in one process."""
    tensors = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in problem.clean.items()}
    out = regard.attention(**problem.arguments(tensors), backend="tiled")
    out, stats = out if isinstance(out, tuple) else (out, None)
    named = {"out": out, **({} if stats is None else stats.named)}
    return named, gradients(named, tensors)


def gradients(named: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    loss = sum(
        (x.masked_fill(x.isinf(), 0).double().square().sum() for x in named.values() if x.is_floating_point()),
        torch.zeros(()),
    )
    leaves = [x for x in tensors.values() if x.requires_grad]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


@given(
    problems(dtype=torch.float64),
    st.integers(1, 5), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_shards_equal_the_whole(problem: Problem, ranks: int, layout: str, key_layout: str) -> None:
    expected, expected_grads = whole(problem)
    L, S = problem.clean["q"].shape[2], problem.clean["k"].shape[2]

    def work(transport: ThreadTransport) -> tuple[dict[str, Tensor], list[Tensor]]:
        shards = SequenceShards(L, transport, layout=layout)
        key_shards = SequenceShards(S, transport, layout=key_layout)
        tensors = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in problem.clean.items()}
        arguments = problem.arguments(tensors)
        local = {"q": shards.shard(arguments.pop("q"), 2)}
        local |= {name: key_shards.shard(arguments.pop(name), 2) for name in "kv"}
        out = attention(**local, **arguments, shards=shards, key_shards=key_shards, backend="tiled")
        out, stats = out if isinstance(out, tuple) else (out, None)
        named = {"out": out, **({} if stats is None else stats.named)}
        # All ranks have `rows`, whose loss is counted once. The losses of all ranks depend on the same outputs.
        counted = {name: x * (name != "rows" or transport.rank == 0) for name, x in named.items()}
        grads = gradients(counted, tensors)
        gathered = {}
        for name, x in named.items():
            gathered[name] = (
                x if name == "rows" else (key_shards if name == "received" else shards).gather(x.detach(), 2)
            )
        return gathered, grads

    results = run_ranks(ranks, work)
    for named, _ in results:
        for name, x in expected.items():
            if name == "top_keys":
                continue
            torch.testing.assert_close(named[name], x.detach(), rtol=1e-8, atol=1e-9, equal_nan=True, msg=name)
    for n, x in enumerate(expected_grads):
        parts = [grads[n] for _, grads in results if grads[n] is not None]
        total = sum(parts) if parts else None
        if x is None or total is None:
            assert x is None or float(x.abs().max()) == 0
            continue
        torch.testing.assert_close(total, x, rtol=1e-7, atol=1e-8)
