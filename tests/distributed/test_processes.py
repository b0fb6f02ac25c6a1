"""Attention over shards on processes, with gloo: outputs, statistics and gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import regard
from regard import Summary, mask, normalizer, position, score
from regard.distributed import SequenceShards, attention

LENGTH = 203


def cases() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 4, (LENGTH,), generator=generator).sort().values
    slopes, w = torch.rand(4, generator=generator), torch.randn(8, generator=generator)
    return [
        {"mask": mask.causal(), "dropout": 0.2, "seed": 5, "summary": Summary(lse=True, top=3, received=True)},
        {"mask": mask.documents(ids) & mask.causal(), "bias": position.ALiBi(slopes.requires_grad_())},
        {"mask": mask.window(left=20, right=0), "normalizer": normalizer.Sparsemax(), "softcap": 3.0},
        {"score": score.Additive(w.requires_grad_()), "normalizer": normalizer.Softmax(sink=torch.zeros(4))},
        {"bias": lambda b, h, i, j: -0.1 * (i - j).abs(), "normalizer": normalizer.Sigmoid(-1.0)},
        {"mask": mask.causal(), "summary": Summary(entropy=True, max=True, rows=(3, -1), full=True)},
    ]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, LENGTH, 8, generator=generator) for heads in (4, 2, 2)]


def parameters(arguments: dict[str, Any]) -> list[Tensor]:
    parts = [arguments.get("bias"), arguments.get("score")]
    found = [getattr(part, name, None) for part in parts for name in ("slopes", "v")]
    return [x for x in found if isinstance(x, Tensor) and x.requires_grad]


def loss_of(out: Any) -> Tensor:
    out, stats = out if isinstance(out, tuple) else (out, None)
    loss = out.square().sum()
    return loss if stats is None or stats.received is None else loss + stats.received.square().sum()


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    group = init_device_mesh("cpu", (ranks,))
    results = []
    for arguments in cases():
        shards = SequenceShards(LENGTH, group, mask=arguments.get("mask"))
        local = [shards.shard(x, 2).requires_grad_() for x in tensors()]
        out = attention(*local, **arguments, shards=shards, reduce=True)
        grads = torch.autograd.grad(loss_of(out), [*local, *parameters(arguments)])
        out, stats = out if isinstance(out, tuple) else (out, None)
        named = {} if stats is None else stats.named
        results.append(
            {
                "out": shards.gather(out.detach(), 2),
                **{name: x.detach() if name == "rows" else shards.gather(x.detach(), 2) for name, x in named.items()},
                "grads": [shards.gather(x, 2) for x in grads[:3]] + list(grads[3:]),
            }
        )
    if rank == ranks - 1:
        torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_compute_the_attention_of_one(ranks: int, tmp_path: Path) -> None:
    mp.spawn(work, args=(ranks, str(tmp_path)), nprocs=ranks)  # type: ignore[attr-defined]
    for arguments, found in zip(cases(), torch.load(tmp_path / "results.pt"), strict=True):
        whole = [x.requires_grad_() for x in tensors()]
        out = regard.attention(*whole, **arguments)
        grads = torch.autograd.grad(loss_of(out), [*whole, *parameters(arguments)])
        out, stats = out if isinstance(out, tuple) else (out, None)
        named = {"out": out, **({} if stats is None else stats.named)}
        for name, x in named.items():
            if name != "top_keys":
                torch.testing.assert_close(found[name], x, rtol=2e-5, atol=2e-5, msg=f"{name} of {arguments}")
        for x, expected in zip(found["grads"], grads, strict=True):
            torch.testing.assert_close(x, expected, rtol=2e-4, atol=2e-4)
