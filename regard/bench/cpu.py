"""The table of the native CPU kernels: every row, against whom, and what it is to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention import attention
from regard.backends.cpu import extension
from regard.bench.goal import Goal, Result, Shape
from regard.bench.length import Length
from regard.bench.peak import LIMITS, Peak
from regard.bench.row import Contest, Outputs, Row
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

Make = Callable[[Shape], Contest]


def _qkv(s: Shape, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    sizes = [(s.H, s.L, s.D), (s.G or s.H, s.keys, s.D), (s.G or s.H, s.keys, s.values)]
    return lambda: [torch.randn(s.B, *size, dtype=dtype) for size in sizes]


def _dot(dtype: torch.dtype = torch.float32, causal: bool = False) -> Make:
    m = mask.causal() if causal else None

    def make(s: Shape) -> Contest:
        pairs = s.pairs * (s.L + 1) / 2 / s.L if causal else s.pairs

        def ours(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Outputs:
            return [attention(q, k, v, mask=m, backend=kernel)]

        def other(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
            return [F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=bool(s.G))]

        return Contest(_qkv(s, dtype), ours, other, pairs, pairs)

    return make


def _masked(build: Callable[[Shape], tuple[Mask, Callable[[], Tensor], float]], dense: bool) -> Make:
    """A mask, against torch with the dense one, or against our own problem without a mask. `build` gives the mask, the
    dense one, and how many pairs it leaves."""

    def make(s: Shape) -> Contest:
        m, table, pairs = build(s)

        def ours(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Outputs:
            return [attention(q, k, v, mask=m, backend=kernel)]

        if not dense:
            return Contest(_qkv(s, torch.float32), ours, lambda q, k, v: [attention(q, k, v)], pairs, s.pairs)
        allowed = table()
        return Contest(
            _qkv(s, torch.float32), ours,
            lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)], pairs, s.pairs,
        )  # fmt: skip

    return make


_WINDOW = 256


def _window(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    place = torch.arange(s.L)

    def table() -> Tensor:
        behind = place[:, None] - place
        return (behind >= 0) & (behind < _WINDOW)

    return mask.window(_WINDOW - 1, 0), table, s.B * s.H * float((place + 1).clamp(max=_WINDOW).sum())


def _padded(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    n = torch.linspace(s.L / 16, s.L, s.B).long()
    return mask.lengths(n), lambda: (torch.arange(s.L) < n[:, None])[:, None, None], s.H * s.L * float(n.sum())


def _documents(s: Shape) -> tuple[Mask, Callable[[], Tensor], float]:
    ids = torch.arange(s.L) * 8 // s.L
    pairs = s.B * s.H * float(ids.bincount().square().sum())
    return mask.documents(ids), lambda: ids[:, None] == ids, pairs


def _dropout(s: Shape) -> Contest:
    def ours(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Outputs:
        return [attention(q, k, v, dropout=0.1, seed=0, backend=kernel)]

    def other(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return [F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)]

    return Contest(_qkv(s, torch.float32), ours, other, s.pairs, s.pairs)


def _bias(s: Shape) -> Contest:
    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: str | None = None) -> Outputs:
        return [attention(q, k, v, bias=bias, backend=kernel)]

    def other(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Outputs:
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=bias)]

    inputs = _qkv(s, torch.float32)
    return Contest(lambda: [*inputs(), torch.randn(1, s.H, s.L, s.L)], ours, other, s.pairs, s.pairs)


def _additive(broadcast: bool) -> Make:
    def make(s: Shape) -> Contest:
        def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor, kernel: str | None = None) -> Outputs:
            return [attention(q, k, v, score=score.Additive(w), backend=kernel)]

        def wide(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Outputs:
            return [torch.softmax(torch.tanh(q[:, :, :, None] + k[:, :, None]) @ w, -1) @ v]

        def dot(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Outputs:
            return [F.scaled_dot_product_attention(q, k, v)]

        inputs = _qkv(s, torch.float32)
        return Contest(
            lambda: [*inputs(), torch.randn(s.D) * s.D**-0.5], ours, wide if broadcast else dot, s.pairs, s.pairs
        )

    return make


def _seen(summary: Summary) -> Make:
    """With a summary, against the same without."""

    def make(s: Shape) -> Contest:
        def ours(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Outputs:
            out, seen = attention(q, k, v, summary=summary, backend=kernel)
            parts = [seen.lse, seen.max, seen.entropy, seen.received, seen.top and seen.top.weights]
            return [out, *[x for x in parts if x is not None]]

        return Contest(_qkv(s, torch.float32), ours, lambda q, k, v: [attention(q, k, v)], s.pairs, s.pairs)

    return make


def _long(s: Shape) -> bool:
    return s.L >= 1024


def _plain() -> list[Row]:
    rows = []
    # ratio forward, share of the peak at length, ratio forward + backward, in float32 and bfloat16, in full and causal.
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
        rows.append(Row(f"forward {kind}", _TORCH, make, SHAPES, forward, limit=name))
        backward = [Goal("ratio", both)]
        if name == "bf16":
            narrow = Goal("ratio", both, "D = 64", lambda s: s.D == 64)
            backward = [narrow, Goal("ratio", 3.0, "D = 128", lambda s: s.D == 128)]
        rows.append(Row(f"forward + backward {kind}", _TORCH, make, SHAPES, backward, True, limit=name))
    return rows


def _additives() -> list[Row]:
    short, middle, long = (Shape(1, 8, n, 64) for n in (512, 1024, 2048))
    broadcast = Row(
        "additive forward", "PyTorch, broadcast", _additive(True), [short, middle], [Goal("ratio", 200)],
        counts="elements", judged=256,
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


def _structured() -> list[Row]:
    cost = [Goal("cost", 1.2)]
    window = Shape(1, 2, 16384, 64)
    rows = [Row("window of 256 at 16384 causal", _DENSE, _masked(_window, True), [window], [Goal("ratio", 20)])]
    for name, build, shape in (
        ("padded batch of 32 to 512", _padded, Shape(32, 8, 512, 64)),
        ("8 documents in 4096", _documents, Shape(1, 8, 4096, 64)),
    ):
        row = Row(f"{name} forward", "our own, dense", _masked(build, False), [shape], cost)
        rows += [row, replace(row, name=f"{name} forward + backward", backward=True)]
    return rows


def _materialised() -> list[Row]:
    square, wide = Shape(1, 8, 1024, 64), Shape(1, 8, 1024, 64, E=128)
    return [
        Row(f"{name} forward + backward", "torch SDPA, materialised", make, [shape], [Goal("ratio", 4)], True)
        for name, make, shape in (
            ("dropout 0.1", _dropout, square), ("learned bias", _bias, square), ("E = 128 for D = 64", _dot(), wide)
        )
    ]  # fmt: skip


def _summaries() -> list[Row]:
    shapes = [Shape(1, 8, 1024, 64), Shape(1, 8, 4096, 64)]
    top = [
        Goal("extra", 0.35, "L = 1024", lambda s: s.L == 1024),
        Goal("extra", 0.20, "L = 4096", lambda s: s.L == 4096),
    ]
    asked = {
        "lse + max + entropy": (Summary(lse=True, max=True, entropy=True), [Goal("extra", 0.03)]),
        "top-8 with keys": (Summary(top=8), top),
        "received": (Summary(received=True), [Goal("extra", 0.50)]),
    }
    return [Row(name, "our forward", _seen(summary), shapes, goals) for name, (summary, goals) in asked.items()]


def _decoding() -> list[Row]:
    shape = Shape(1, 32, 1, 128, S=8192, G=8)
    goals = [Goal("ratio", 1), Goal("share", 0.85)]
    # 64 MiB of float32 and 32 of bfloat16: as much as the last cache of some machines.
    single = Row("decode at S = 8192 fp32", _TORCH, _dot(), [shape], goals, limit="read", counts="bytes", copies=4)
    half = replace(single, name="decode at S = 8192 bf16", make=_dot(torch.bfloat16), copies=8)
    return [single, half]


def _overhead() -> list[Row]:
    return [
        Row(f"call at L = 16 {name}{' causal' if causal else ''}", _TORCH, _dot(causal=causal), [Shape(1, 8, 16, 64)],
            [Goal("time", bound)], backward)
        for causal in (False, True)
        for name, bound, backward in (("forward", 0.5, False), ("forward + backward", 0.7, True))
    ]  # fmt: skip


def _narrow() -> list[Row]:
    if "avx2" not in extension.instructions():
        return []
    forward = Row("AVX2 forced forward", _TORCH, _dot(), SHAPES[:2], [Goal("ratio", 1.1)], instructions="avx2")
    return [forward, replace(forward, name="AVX2 forced forward + backward", shapes=SHAPES[:1], backward=True)]


def _lengths() -> list[Length]:
    return [
        Length("length 65536 dot forward + backward", "dot", Shape(1, 1, 65536, 64), _dot(), 1024),
        Length("length 65536 additive forward + backward", "additive", Shape(1, 1, 65536, 64), _additive(False), 256),
    ]


def rows() -> list[Row | Length]:
    """All rows of the table."""
    return [
        *_plain(), *_additives(), *_structured(), *_materialised(), *_summaries(), *_decoding(), *_overhead(), *_narrow(),
        *_lengths(),
    ]  # fmt: skip


def chosen(names: str | None) -> list[Row | Length]:
    """The rows whose names hold one of these words, which commas separate; by default all but those that take minutes."""
    every = rows()
    if names is None:
        return [row for row in every if row.always]
    words = [word.strip().lower() for word in names.split(",") if word.strip()]
    for word in words:
        if not any(word in row.name.lower() for row in every):
            raise ValueError(
                f"--rows: no row has {word!r} in its name; there are: {'; '.join(row.name for row in every)}"
            )
    return [row for row in every if any(word in row.name.lower() for word in words)]


def measure(picked: Sequence[Row | Length], seconds: float, threads: int) -> tuple[dict[str, Peak], Iterator[Result]]:
    """The peaks of this machine, which get better while they are measured again in turns with the rows; and the results of
    the rows, one by one, as they are asked for.

    Args:
        seconds: how long each problem is timed, about.
        threads: those that torch has been set to, for the processes that are started.

    Raises:
        ValueError: there are no native kernels, or no such row.
    """
    if extension.missing:
        raise ValueError(extension.missing)
    peaks = {limit: Peak(limit) for limit in LIMITS}
    return peaks, (result for row in picked for result in row.results(peaks, seconds, threads))
