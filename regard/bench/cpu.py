"""The rows of `regard bench cpu`: the native CPU kernels, their baselines and goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention import attention
from regard.backends.cpu import extension
from regard.bench.goal import Goal, RowResult, Shape
from regard.bench.length import MemoryRow
from regard.bench.peak import LIMITS, Peak
from regard.bench.row import CpuRow, Implementations, Outputs
from regard.components import mask, score
from regard.components.mask import Mask
from regard.components.summary import Summary

SHAPES = [
    Shape(1, 8, 1024, 64),
    Shape(1, 8, 4096, 64),
    Shape(1, 8, 4096, 128),
    Shape(8, 8, 512, 64),
    Shape(32, 8, 128, 64),
]
_TORCH = "torch SDPA"
_DENSE = "torch SDPA, dense mask"

Make = Callable[[Shape], Implementations]


def _qkv(s: Shape, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    sizes = [(s.H, s.L, s.D), (s.G or s.H, s.keys, s.D), (s.G or s.H, s.keys, s.values)]
    return lambda: [torch.randn(s.B, *size, dtype=dtype) for size in sizes]


def _dot(dtype: torch.dtype = torch.float32, causal: bool = False) -> Make:
    m = mask.causal() if causal else None

    def make(s: Shape) -> Implementations:
        pairs = s.pairs * (s.L + 1) / 2 / s.L if causal else s.pairs

        def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Outputs:
            return [attention(q, k, v, mask=m, backend=backend)]

        def other(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
            return [F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=bool(s.G))]

        return Implementations(_qkv(s, dtype), ours, other, pairs, pairs)

    return make


def _masked(build: Callable[[Shape], tuple[Mask, Callable[[], Tensor], float]], dense: bool) -> Make:
    """Compare a mask with PyTorch and the dense mask, or with our own attention without a mask.

    `build` returns the mask, a function that creates the dense mask, and the number of pairs that the mask allows.
    """

    def make(s: Shape) -> Implementations:
        m, dense_mask, pairs = build(s)

        def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Outputs:
            return [attention(q, k, v, mask=m, backend=backend)]

        if not dense:
            return Implementations(_qkv(s, torch.float32), ours, lambda q, k, v: [attention(q, k, v)], pairs, s.pairs)
        allowed = dense_mask()
        return Implementations(
            _qkv(s, torch.float32), ours,
            lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)], pairs, s.pairs,
        )  # fmt: skip

    return make


_WINDOW = 256


def _window(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    position = torch.arange(s.L)

    def dense_mask() -> Tensor:
        distance = position[:, None] - position
        return (distance >= 0) & (distance < _WINDOW)

    return mask.window(_WINDOW - 1, 0), dense_mask, s.B * s.H * float((position + 1).clamp(max=_WINDOW).sum())


def _padded(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    n = torch.linspace(s.L / 16, s.L, s.B).long()
    return mask.lengths(n), lambda: (torch.arange(s.L) < n[:, None])[:, None, None], s.H * s.L * float(n.sum())


def _documents(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    ids = torch.arange(s.L) * 8 // s.L
    pairs = s.B * s.H * float(ids.bincount().square().sum())
    return mask.documents(ids), lambda: ids[:, None] == ids, pairs


def _dropout(s: Shape) -> Implementations:
    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Outputs:
        return [attention(q, k, v, dropout=0.1, seed=0, backend=backend)]

    def other(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return [F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)]

    return Implementations(_qkv(s, torch.float32), ours, other, s.pairs, s.pairs)


def _bias(s: Shape) -> Implementations:
    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str | None = None) -> Outputs:
        return [attention(q, k, v, bias=bias, backend=backend)]

    def other(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Outputs:
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=bias)]

    inputs = _qkv(s, torch.float32)
    return Implementations(lambda: [*inputs(), torch.randn(1, s.H, s.L, s.L)], ours, other, s.pairs, s.pairs)


def _additive(broadcast: bool) -> Make:
    def make(s: Shape) -> Implementations:
        def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor, backend: str | None = None) -> Outputs:
            return [attention(q, k, v, score=score.Additive(w), backend=backend)]

        def broadcast_score(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Outputs:
            return [torch.softmax(torch.tanh(q[:, :, :, None] + k[:, :, None]) @ w, -1) @ v]

        def dot(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Outputs:
            return [F.scaled_dot_product_attention(q, k, v)]

        inputs = _qkv(s, torch.float32)
        return Implementations(
            lambda: [*inputs(), torch.randn(s.D) * s.D**-0.5],
            ours,
            broadcast_score if broadcast else dot,
            s.pairs,
            s.pairs,
        )

    return make


def _with_summary(summary: Summary) -> Make:
    """Compare attention with a summary with the same attention without one."""

    def make(s: Shape) -> Implementations:
        def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Outputs:
            out, result = attention(q, k, v, summary=summary, backend=backend)
            parts = [result.lse, result.max, result.entropy, result.received, result.top and result.top.weights]
            return [out, *[x for x in parts if x is not None]]

        return Implementations(_qkv(s, torch.float32), ours, lambda q, k, v: [attention(q, k, v)], s.pairs, s.pairs)

    return make


def _long(s: Shape) -> bool:
    return s.L >= 1024


def _plain() -> list[CpuRow]:
    rows = []
    # (dtype, causal): (ratio of forward, share of the peak of forward at L >= 1024, ratio of forward + backward)
    goals = {
        ("fp32", False): (2.5, 0.80, 2.6),
        ("fp32", True): (3.0, 0.75, 3.2),
        ("bf16", False): (4.8, 0.85, 3.8),
        ("bf16", True): (5.5, 0.75, 4.5),
    }
    for (name, causal), (ratio, share, both) in goals.items():
        make = _dot(torch.bfloat16 if name == "bf16" else torch.float32, causal)
        kind = f"{name}{' causal' if causal else ''}"
        forward = [Goal("ratio", ratio), Goal("share", share, "L >= 1024", _long)]
        rows.append(CpuRow(f"forward {kind}", _TORCH, make, SHAPES, forward, limit=name))
        backward = [Goal("ratio", both)]
        if name == "bf16":
            narrow = Goal("ratio", both, "D = 64", lambda s: s.D == 64)
            backward = [narrow, Goal("ratio", 3.0, "D = 128", lambda s: s.D == 128)]
        rows.append(CpuRow(f"forward + backward {kind}", _TORCH, make, SHAPES, backward, True, limit=name))
    return rows


def _additives() -> list[CpuRow]:
    short, middle, long = (Shape(1, 8, n, 64) for n in (512, 1024, 2048))
    broadcast = CpuRow(
        "additive forward", "PyTorch, broadcast", _additive(True), [short, middle], [Goal("ratio", 200)],
        counts="elements", error_length=256,
    )  # fmt: skip
    dot = replace(
        broadcast, name="additive forward against dot", against=_TORCH, make=_additive(False), shapes=[short, middle, long],
        goals=[Goal("ratio", 1.4), Goal("scaled", 50)],
    )  # fmt: skip
    return [
        broadcast,
        dot,
        replace(
            broadcast, name="additive forward + backward", shapes=[short], goals=[Goal("ratio", 120)], backward=True
        ),
        replace(dot, name="additive forward + backward against dot", goals=[Goal("ratio", 1)], backward=True),
    ]


def _structured() -> list[CpuRow]:
    cost = [Goal("cost", 1.2)]
    window = Shape(1, 2, 16384, 64)
    rows = [CpuRow("window of 256 at 16384 causal", _DENSE, _masked(_window, True), [window], [Goal("ratio", 20)])]
    for name, build, shape in (
        ("padded batch of 32 to 512", _padded, Shape(32, 8, 512, 64)),
        ("8 documents in 4096", _documents, Shape(1, 8, 4096, 64)),
    ):
        row = CpuRow(f"{name} forward", "ours, without a mask", _masked(build, False), [shape], cost)
        rows += [row, replace(row, name=f"{name} forward + backward", backward=True)]
    return rows


def _materialized() -> list[CpuRow]:
    square, wide = Shape(1, 8, 1024, 64), Shape(1, 8, 1024, 64, E=128)
    return [
        CpuRow(f"{name} forward + backward", "torch SDPA, materialized", make, [shape], [Goal("ratio", 4)], True)
        for name, make, shape in (
            ("dropout 0.1", _dropout, square), ("learned bias", _bias, square), ("E = 128 for D = 64", _dot(), wide)
        )
    ]  # fmt: skip


def _summaries() -> list[CpuRow]:
    shapes = [Shape(1, 8, 1024, 64), Shape(1, 8, 4096, 64)]
    top = [
        Goal("extra", 0.35, "L = 1024", lambda s: s.L == 1024),
        Goal("extra", 0.20, "L = 4096", lambda s: s.L == 4096),
    ]
    summaries = {
        "lse + max + entropy": (Summary(lse=True, max=True, entropy=True), [Goal("extra", 0.03)]),
        "top-8 with keys": (Summary(top=8), top),
        "received": (Summary(received=True), [Goal("extra", 0.50)]),
    }
    return [
        CpuRow(name, "ours, without a summary", _with_summary(summary), shapes, goals)
        for name, (summary, goals) in summaries.items()
    ]


def _decoding() -> list[CpuRow]:
    shape = Shape(1, 32, 1, 128, S=8192, G=8)
    goals = [Goal("ratio", 1), Goal("share", 0.85)]
    # 64 MiB of float32 and 32 MiB of bfloat16: the size of the last-level cache of some machines.
    single = CpuRow("decode at S = 8192 fp32", _TORCH, _dot(), [shape], goals, limit="read", counts="bytes", copies=4)
    half = replace(single, name="decode at S = 8192 bf16", make=_dot(torch.bfloat16), copies=8)
    return [single, half]


def _overhead() -> list[CpuRow]:
    return [
        CpuRow(f"call at L = 16 {name}{' causal' if causal else ''}", _TORCH, _dot(causal=causal), [Shape(1, 8, 16, 64)],
            [Goal("time", bound)], backward)
        for causal in (False, True)
        for name, bound, backward in (("forward", 0.5, False), ("forward + backward", 0.7, True))
    ]  # fmt: skip


def _narrow() -> list[CpuRow]:
    if "avx2" not in extension.instructions():
        return []
    forward = CpuRow("AVX2 forced forward", _TORCH, _dot(), SHAPES[:2], [Goal("ratio", 1.1)], instructions="avx2")
    return [forward, replace(forward, name="AVX2 forced forward + backward", shapes=SHAPES[:1], backward=True)]


def _lengths() -> list[MemoryRow]:
    return [
        MemoryRow("length 65536 dot forward + backward", "dot", Shape(1, 1, 65536, 64), _dot(), 1024),
        MemoryRow(
            "length 65536 additive forward + backward", "additive", Shape(1, 1, 65536, 64), _additive(False), 256
        ),
    ]


def rows() -> list[CpuRow | MemoryRow]:
    """Return all rows of the table."""
    return [
        *_plain(), *_additives(), *_structured(), *_materialized(), *_summaries(), *_decoding(), *_overhead(), *_narrow(),
        *_lengths(),
    ]  # fmt: skip


def select_rows(names: str | None) -> list[CpuRow | MemoryRow]:
    """Return the rows whose names contain one of the comma-separated `names`; by default all except those that take minutes.

    >>> from regard.bench.cpu import select_rows
    >>> [row.name for row in select_rows("Received")]
    ['received']
    """
    every = rows()
    if names is None:
        return [row for row in every if row.always]
    patterns = [part.strip().lower() for part in names.split(",") if part.strip()]
    for pattern in patterns:
        if not any(pattern in row.name.lower() for row in every):
            raise ValueError(
                f"--rows: no row name contains {pattern!r}; the rows are: {'; '.join(row.name for row in every)}"
            )
    return [row for row in every if any(pattern in row.name.lower() for pattern in patterns)]


def measure(
    selected: Sequence[CpuRow | MemoryRow], seconds: float, threads: int
) -> tuple[dict[str, Peak], Iterator[RowResult]]:
    """Return the peaks of this machine, and an iterator over the results of the rows.

    The iterator also measures the peaks again, in turns with the rows, and improves them.

    Args:
        seconds: approximate duration of the timing of each problem.
        threads: number of threads that torch is set to, for the processes that are started.

    Raises:
        ValueError: the native kernels are unavailable.
    """
    if extension.missing:
        raise ValueError(extension.missing)
    peaks = {limit: Peak(limit) for limit in LIMITS}
    return peaks, (result for row in selected for result in row.results(peaks, seconds, threads))
