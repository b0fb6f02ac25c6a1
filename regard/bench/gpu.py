"""Benchmark of the GPU kernels against PyTorch's SDPA, FlexAttention and a compiled broadcast.

Wrong results are not timed. Times are medians measured by `triton.testing.do_bench`, which clears the L2 cache before
each call; ours and theirs alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from regard.attention import attention
from regard.bench.error import Error, error
from regard.bench.goal import METRICS, Shape
from regard.bench.measure import make_call
from regard.components import mask, position, score
from regard.components.summary import Summary

Outputs = Sequence[Tensor]
# Takes the inputs, and optionally `backend`.
Implementation = Callable[..., Outputs]
# Measures a call in milliseconds.
Timer = Callable[[Callable[[], object]], float]

# Units of the peaks that `measure_peaks` returns.
PEAK_UNITS = {"matmul": "TFLOP/s of bfloat16 matmul", "tanh": "G tanh/s"}
_WINDOW, _DOCUMENT, _CAP = 1024, 1024, 30.0
# Results are checked up to this length, against a materialized float64 reference.
_MAX_CHECKED_LENGTH = 512
_ROUNDS = 3


@dataclass(frozen=True)
class GpuRow:
    """A row of the table: what is measured, against what, and the goal.

    Args:
        name, against: what is measured, and the baseline.
        shape, dtype: of the inputs.
        backward: whether the backward pass is included.
        metric, goal: a key of `regard.bench.goal.METRICS`, and its bound.
        ours, other: return the implementations for a shape.
        inputs: returns the inputs for a shape.
        pairs: returns the number of query-key pairs that are not masked.
    """

    name: str
    against: str
    shape: Shape
    dtype: torch.dtype
    backward: bool
    metric: str
    goal: float
    ours: Callable[[Shape, torch.device], Implementation]
    other: Callable[[Shape, torch.device], Implementation]
    inputs: Callable[[GpuRow, Shape, torch.device], list[Tensor]]
    pairs: Callable[[Shape], float]

    @property
    def label(self) -> str:
        """The name with width and direction."""
        return f"{self.name}, D {self.shape.D}, {'forward + backward' if self.backward else 'forward'}"


@dataclass(frozen=True)
class GpuResult:
    """The error of a row and, if that is within its budget, times, the value of the metric and the share of the peak."""

    row: GpuRow
    error: Error
    ours_ms: float | None = None
    other_ms: float | None = None
    value: float | None = None
    share: float | None = None

    @property
    def met(self) -> bool:
        """Whether the result is correct, and meets the goal."""
        if not self.error.within or self.value is None:
            return False
        return self.value >= self.row.goal if METRICS[self.row.metric].is_higher_better else self.value <= self.row.goal

    @property
    def formatted(self) -> str:
        """The value of the metric as text."""
        return "none: wrong" if self.value is None else METRICS[self.row.metric].write(self.value)


def _qkv(row: GpuRow, shape: Shape, device: torch.device) -> list[Tensor]:
    def randn(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(shape.B, heads, length, width, device=device, dtype=row.dtype)

    return [randn(shape.H, shape.L, shape.D), *(randn(shape.G or shape.H, shape.keys, shape.D) for _ in range(2))]


def _qkvw(row: GpuRow, shape: Shape, device: torch.device) -> list[Tensor]:
    return [*_qkv(row, shape, device), torch.randn(shape.D, device=device)]


def _regard(
    make_arguments: Callable[[Shape, torch.device], dict[str, Any]], default_backend: str | None = None
) -> Callable[[Shape, torch.device], Implementation]:
    """Return a factory of our implementation, whose summaries follow the output."""

    def make(shape: Shape, device: torch.device) -> Implementation:
        arguments = make_arguments(shape, device)

        def run(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> list[Tensor]:
            backend = backend or default_backend
            if "summary" not in arguments:
                return [attention(q, k, v, backend=backend, **arguments)]
            out, summary = attention(q, k, v, backend=backend, **arguments)
            outputs = [out, *[x for x in summary if isinstance(x, Tensor)]]
            return outputs if summary.top is None else [*outputs, summary.top.weights]

        return run

    return make


def _sdpa(shape: Shape, device: torch.device) -> Implementation:
    return lambda q, k, v, backend=None: [F.scaled_dot_product_attention(q, k, v, is_causal=True)]


def _document_ids(shape: Shape, device: torch.device) -> Tensor:
    return torch.arange(shape.L, device=device) // _DOCUMENT


def _compile_on_gpu(function: Any, device: torch.device) -> Any:
    """Compile a function if the device is a GPU."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def _flex(kind: str) -> Callable[[Shape, torch.device], Implementation]:
    """Return a factory of compiled FlexAttention, whose block mask is made once."""

    def make(shape: Shape, device: torch.device) -> Implementation:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ids, slopes = _document_ids(shape, device), torch.tensor(position.alibi_slopes(shape.H), device=device)

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k

        def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (q - k < _WINDOW)

        def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (ids[q] == ids[k])

        def softcap(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.tanh(s / _CAP) * _CAP

        def alibi(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s - slopes[h] * (q - k).abs()

        mask_mod = {"window": window, "documents": documents}.get(kind, causal)
        score_mod = {"softcap": softcap, "ALiBi": alibi}.get(kind)
        block_mask = create_block_mask(mask_mod, None, None, shape.L, shape.keys, device=device)
        flex = _compile_on_gpu(flex_attention, device)
        return lambda q, k, v, backend=None: [flex(q, k, v, score_mod=score_mod, block_mask=block_mask)]

    return make


def _additive(shape: Shape, device: torch.device) -> Implementation:
    return lambda q, k, v, w, backend=None: [attention(q, k, v, score=score.Additive(w), backend=backend)]


def _broadcast(shape: Shape, device: torch.device) -> Implementation:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        s = (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) * w.to(q.dtype)).sum(-1)
        return torch.softmax(s.float(), -1).to(v.dtype) @ v

    compiled = _compile_on_gpu(attend, device)
    return lambda q, k, v, w, backend=None: [compiled(q, k, v, w)]


def _causal_pairs(shape: Shape) -> float:
    return shape.B * shape.H * shape.L * (shape.L + 1) / 2


def _window_pairs(shape: Shape, keys_per_query: int) -> float:
    return shape.B * shape.H * min(shape.L * keys_per_query, shape.L * (shape.L + 1) / 2)


_VARIANTS: dict[str, tuple[Callable[[Shape, torch.device], dict[str, Any]], Callable[[Shape], float]]] = {
    "window": (lambda s, d: {"mask": mask.causal() & mask.window(_WINDOW - 1, 0)}, lambda s: _window_pairs(s, _WINDOW)),
    "documents": (
        lambda s, d: {"mask": mask.causal() & mask.documents(_document_ids(s, d))},
        lambda s: _window_pairs(s, _DOCUMENT // 2),
    ),
    "softcap": (lambda s, d: {"mask": mask.causal(), "softcap": _CAP}, _causal_pairs),
    "ALiBi": (lambda s, d: {"mask": mask.causal(), "bias": position.ALiBi()}, _causal_pairs),
}
_SUMMARIES = {
    "entropy, lse, max": (Summary(entropy=True, lse=True, max=True), 0.05),
    "top 8": (Summary(top=8), 0.40),
    "top 8, received": (Summary(top=8, received=True), 0.70),
}


def rows() -> list[GpuRow]:
    """Return the rows of the table. Batches have 16,384 tokens of width 2,048.

    >>> from regard.bench.gpu import rows
    >>> {(row.shape.B * row.shape.L, row.shape.H * row.shape.D) for row in rows() if row.name != "additive"}
    {(16384, 2048)}
    """
    bf16, rows = torch.bfloat16, []
    shapes = [Shape(4, 2048 // D, 4096, D) for D in (64, 128)]
    causal = _regard(lambda s, d: {"mask": mask.causal()})
    for shape in shapes:
        for backward in (False, True):
            rows.append(
                GpuRow("causal", "torch SDPA", shape, bf16, backward, "ratio", 0.98, causal, _sdpa, _qkv, _causal_pairs)
            )
            for name, (make_arguments, pairs) in _VARIANTS.items():
                rows.append(
                    GpuRow(
                        name,
                        "FlexAttention",
                        shape,
                        bf16,
                        backward,
                        "ratio",
                        1.1,
                        _regard(make_arguments),
                        _flex(name),
                        _qkv,
                        pairs,
                    )
                )
    # The same kernel without a summary: without a name, SDPA would serve the plain case.
    without = _regard(lambda s, d: {"mask": mask.causal()}, "triton")
    for name, (summary, goal) in _SUMMARIES.items():
        rows.append(
            GpuRow(
                name, "the same without", shapes[0], bf16, False, "extra", goal,
                _regard(lambda s, d, summary=summary: {"mask": mask.causal(), "summary": summary}),  # type: ignore[misc]
                without, _qkv, _causal_pairs,
            )
        )  # fmt: skip
    for L, backward, metric, goal in (
        (4096, False, "ratio", 30.0),
        (4096, False, "elements", 5000.0),
        (1024, True, "ratio", 25.0),
    ):
        shape = Shape(1, 8, L, 64)
        rows.append(
            GpuRow(
                "additive", "compiled broadcast", shape, bf16, backward, metric, goal, _additive, _broadcast, _qkvw,
                lambda s: float(s.pairs),
            )
        )  # fmt: skip
    return rows


def do_bench(function: Callable[[], object]) -> float:
    """Return the median time of many calls, in milliseconds."""
    from triton.testing import do_bench as measure

    return float(measure(function, warmup=20, rep=60, return_mode="median"))


def measure_peaks(device: torch.device, timer: Timer = do_bench, size: int = 8192) -> dict[str, float]:
    """Measure the peaks of a GPU, by the keys of PEAK_UNITS: TFLOP/s, and 1e9 tanh per second."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / timer(lambda: a @ b) / 1e9
    # A chain of tanh, long enough that memory bandwidth does not matter.
    x = torch.randn(size * 512, device=device)

    def chain(x: Tensor) -> Tensor:
        for _ in range(64):
            x = torch.tanh(x)
        return x

    compiled = _compile_on_gpu(chain, device)
    return {"matmul": matmul, "tanh": 64 * x.numel() / timer(lambda: compiled(x)) / 1e6}


def measure(
    rows: Sequence[GpuRow], device: torch.device, peaks: dict[str, float], timer: Timer = do_bench
) -> Iterator[GpuResult]:
    """Check each row against the reference, and time it if it is correct."""
    for row in rows:
        small = Shape(1, 2, min(row.shape.L, _MAX_CHECKED_LENGTH), row.shape.D)
        row_error = error(row.ours(small, device), partial(row.inputs, row, small, device), row.backward)
        if not row_error.within:
            yield GpuResult(row, row_error)
            continue
        torch.manual_seed(0)
        inputs = row.inputs(row, row.shape, device)
        calls = [make_call(make(row.shape, device), inputs, row.backward) for make in (row.ours, row.other)]
        times = [[timer(call) for call in calls] for _ in range(_ROUNDS)]
        ours, other = (statistics.median(x) for x in zip(*times, strict=True))
        work = row.pairs(row.shape) * row.shape.D
        rate = work / ours / 1e6  # 1e9 elements (i, j, d) per second
        is_additive = row.other is _broadcast
        passes = 1.0 if is_additive or not row.backward else 3.5
        share = rate / peaks["tanh"] if is_additive else 4 * rate * passes / peaks["matmul"] / 1e3
        value = {"ratio": other / ours, "extra": ours / other - 1, "elements": rate}[row.metric]
        yield GpuResult(row, row_error, ours, other, value, share)


def as_table(results: Sequence[GpuResult], peaks: dict[str, float], name: str) -> Table:
    """Return the table for a terminal, in which metrics that meet their goals are green."""
    peak_text = ", ".join(f"{peaks[key]:,.0f} {unit}" for key, unit in PEAK_UNITS.items())
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}, PyTorch {torch.__version__}", caption=f"peaks: {peak_text}")
    for column in ("", "against", "ms", "theirs", "measured", "goal", "of peak", "error (of budget)"):
        table.add_column(column, justify="left" if column in ("", "against") else "right", no_wrap=True)
    for r in results:
        ours, other, share, goal = _cells(r)
        error_style = "" if r.error.within else "bold red"
        table.add_row(
            r.row.label, r.row.against, ours, other, Text(r.formatted, style="green" if r.met else "red"), goal, share,
            Text(_error(r), style=error_style),
        )  # fmt: skip
    return table


def _cells(r: GpuResult) -> list[str]:
    """Return the cells of our time, their time, the share of the peak, and the goal."""
    times = ["-" if x is None else f"{x:.3g}" for x in (r.ours_ms, r.other_ms)]
    return [*times, "-" if r.share is None else f"{r.share:.0%}", METRICS[r.row.metric].write(r.row.goal)]


def _error(r: GpuResult) -> str:
    return f"{r.error.relative:.0e} ({r.error.share:.0%})"


def as_markdown(results: Sequence[GpuResult], peaks: dict[str, float], name: str) -> str:
    """Return the table for the documentation."""
    peak_text = ", ".join(f"{peaks[key]:,.0f} {unit}" for key, unit in PEAK_UNITS.items())
    lines = [
        f"{name}, PyTorch {torch.__version__}; peaks: {peak_text}.", "",
        "| | against | ms | theirs | measured | goal | | of peak | error (of budget) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results:
        ours, other, share, goal = _cells(r)
        cells = [r.row.label, r.row.against, ours, other, r.formatted, goal, "met" if r.met else "not met", share]
        lines.append(f"| {' | '.join([*cells, _error(r)])} |")
    return "\n".join(lines)
