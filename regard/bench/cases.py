"""The cases of `regard bench`: each compares regard with the fastest equivalent in PyTorch or another package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention import attention
from regard.components import mask, normalizer, position, score
from regard.components.summary import Summary

Inputs = list[Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison. `ours` and `peer` take the same inputs and return the same outputs, in the same order.

    A `model` that both call is in training mode, with dropout, for timing, and in eval mode for comparing outputs.
    """

    name: str
    shape: str
    peer_name: str
    inputs: Callable[[], Inputs]
    ours: Callable[..., Sequence[Tensor]]
    peer: Callable[..., Sequence[Tensor]]
    backward: bool = True
    model: nn.Module = field(default_factory=nn.Identity)


def _qkv(B: int, H: int, L: int, D: int) -> Callable[[], Inputs]:
    return lambda: [torch.randn(B, H, L, D) for _ in range(3)]


def _plain(causal: bool) -> Case:
    m = mask.causal() if causal else None
    return Case(
        "causal" if causal else "plain",
        "1x8x1024x64",
        "torch SDPA",
        _qkv(1, 8, 1024, 64),
        lambda q, k, v: [attention(q, k, v, mask=m)],
        lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, is_causal=causal)],
    )


def _masked(name: str, shape: tuple[int, int, int, int], m: mask.Mask, dense: Tensor) -> Case:
    return Case(
        name,
        "x".join(map(str, shape)),
        "torch SDPA, dense mask",
        _qkv(*shape),
        lambda q, k, v: [attention(q, k, v, mask=m)],
        lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, attn_mask=dense)],
    )


def _window() -> Case:
    L, width = 4096, 256
    distance = torch.arange(L)[:, None] - torch.arange(L)
    return _masked(
        f"window of {width}, causal", (1, 8, L, 64), mask.window(width - 1, 0), (distance >= 0) & (distance < width)
    )


def _padded() -> Case:
    n = torch.linspace(32, 512, 16).long()
    return _masked(
        "padded batch, 32 to 512", (16, 8, 512, 64), mask.lengths(n), (torch.arange(512) < n[:, None])[:, None, None]
    )


def _documents() -> Case:
    ids = torch.arange(4096) // 512
    return _masked("8 packed documents", (1, 8, 4096, 64), mask.documents(ids), ids[:, None] == ids)


def _alibi() -> Case:
    L = 2048
    distance = (torch.arange(L)[:, None] - torch.arange(L)).abs()

    def peer(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> list[Tensor]:
        bias = -slopes[:, None, None] * distance
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))]

    return Case(
        "ALiBi, learned slopes",
        f"1x8x{L}x64",
        "torch SDPA, bias matrix",
        lambda: [*_qkv(1, 8, L, 64)(), torch.rand(8)],
        lambda q, k, v, slopes: [attention(q, k, v, bias=position.ALiBi(slopes))],
        peer,
    )


def _softcap() -> Case:
    def peer(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        s = q @ k.mT * q.shape[-1] ** -0.5
        return [torch.softmax(torch.tanh(s / 30) * 30, -1) @ v]

    return Case(
        "softcap", "1x8x2048x64", "PyTorch, materialized", _qkv(1, 8, 2048, 64),
        lambda q, k, v: [attention(q, k, v, softcap=30.0)], peer,
    )  # fmt: skip


def _additive() -> Case:
    def peer(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        return [torch.softmax(torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w, -1) @ v]

    return Case(
        "additive (Bahdanau)", "1x8x256x64", "PyTorch, broadcast", lambda: [*_qkv(1, 8, 256, 64)(), torch.randn(64)],
        lambda q, k, v, w: [attention(q, k, v, score=score.Additive(w))], peer,
    )  # fmt: skip


def _sparse(name: str, sparse: normalizer.Normalizer, function: str) -> Case:
    def peer(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        import entmax

        return [getattr(entmax, function)(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v]

    return Case(
        name, "1x8x1024x64", "entmax package, materialized", _qkv(1, 8, 1024, 64),
        lambda q, k, v: [attention(q, k, v, normalizer=sparse)], peer,
    )  # fmt: skip


def _weights() -> Case:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, summary = attention(q, k, v, summary=Summary(entropy=True, top=8, received=True))
        assert summary.entropy is not None and summary.top is not None and summary.received is not None
        return [out, summary.entropy, summary.top.weights, summary.received]

    def peer(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return [p @ v, torch.special.entr(p).sum(-1), p.topk(8).values, p.sum(-2)]

    return Case(
        "entropy, top 8, received", "1x8x2048x64", "PyTorch, materialized", _qkv(1, 8, 2048, 64), ours, peer, False
    )


def cases() -> list[Case]:
    """Return all comparisons whose peer is installed."""
    available = [_plain(False), _plain(True), _window(), _padded(), _documents(), _alibi(), _softcap(), _additive()]
    if importlib.util.find_spec("entmax"):
        available.append(_sparse("sparsemax", normalizer.Sparsemax(), "sparsemax"))
        available.append(_sparse("entmax 1.5", normalizer.Entmax(1.5), "entmax15"))
    return [*available, _weights()]
