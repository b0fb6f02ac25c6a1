"""The GPU against what it is to reach: PyTorch's own attention, FlexAttention, and the compiled broadcast.

What is wrong is not timed. Times are Triton's: medians of many, with the caches cleared before
each, ours and theirs in turns.
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
from regard.bench.goal import FIGURES, Shape
from regard.bench.measure import ready
from regard.components import mask, position, score
from regard.components.summary import Summary

Outputs = Sequence[Tensor]
Way = Callable[..., Outputs]
# Gives the milliseconds of a call.
Timer = Callable[[Callable[[], object]], float]

# What the matrix units and the special functions of the GPU do at most, in thousand millions a second.
LIMITS = {"products": "TFLOP/s of products in bfloat16", "tanh": "G tanh/s"}
_WINDOW, _DOCUMENT, _CAP = 1024, 1024, 30.0
# Lengths that are materialised in float64 to judge by.
_JUDGED = 512
_TURNS = 3


@dataclass(frozen=True)
class Row:
    """What is done, against whom, and what is asked of it: `figure` is one of `regard.bench.goal.FIGURES`."""

    name: str
    against: str
    shape: Shape
    dtype: torch.dtype
    backward: bool
    figure: str
    goal: float
    ours: Callable[[Shape, torch.device], Way]
    other: Callable[[Shape, torch.device], Way]
    inputs: Callable[[Row, Shape, torch.device], list[Tensor]]
    pairs: Callable[[Shape], float]  # that are attended to

    @property
    def label(self) -> str:
        """The row, with its direction and shape."""
        return f"{self.name}, D {self.shape.D}, {'forward + backward' if self.backward else 'forward'}"


@dataclass(frozen=True)
class Result:
    """What a row reached; nothing where it is wrong. `share` is that of the ceiling."""

    row: Row
    error: Error
    ours_ms: float | None = None
    other_ms: float | None = None
    figure: float | None = None
    share: float | None = None

    @property
    def met(self) -> bool:
        """Is it right, and as good as is asked?"""
        figure = FIGURES[self.row.figure]
        if not self.error.within or self.figure is None:
            return False
        return self.figure >= self.row.goal if figure.more else self.figure <= self.row.goal

    @property
    def written(self) -> str:
        """The figure in words."""
        return "none: wrong" if self.figure is None else FIGURES[self.row.figure].write(self.figure)


def _qkv(row: Row, shape: Shape, device: torch.device) -> list[Tensor]:
    def randn(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(shape.B, heads, length, width, device=device, dtype=row.dtype)

    return [randn(shape.H, shape.L, shape.D), *(randn(shape.G or shape.H, shape.keys, shape.D) for _ in range(2))]


def _qkvw(row: Row, shape: Shape, device: torch.device) -> list[Tensor]:
    return [*_qkv(row, shape, device), torch.randn(shape.D, device=device)]


def _regard(
    words: Callable[[Shape, torch.device], dict[str, Any]], forced: str | None = None
) -> Callable[[Shape, torch.device], Way]:
    """Ours, of q, k and v, with its summaries after the output; by the kernel `forced`, unless another is asked for."""

    def make(shape: Shape, device: torch.device) -> Way:
        said = words(shape, device)

        def run(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> list[Tensor]:
            kernel = kernel or forced
            if "summary" not in said:
                return [attention(q, k, v, backend=kernel, **said)]
            out, seen = attention(q, k, v, backend=kernel, **said)
            told = [x for x in seen if isinstance(x, Tensor)]
            return [out, *told, *([] if seen.top is None else [seen.top.weights])]

        return run

    return make


def _sdpa(shape: Shape, device: torch.device) -> Way:
    return lambda q, k, v, kernel=None: [F.scaled_dot_product_attention(q, k, v, is_causal=True)]


def _ids(shape: Shape, device: torch.device) -> Tensor:
    return torch.arange(shape.L, device=device) // _DOCUMENT


def _compiled(function: Any, device: torch.device) -> Any:
    """Compiled where that is what people run: on a GPU."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def _flex(kind: str) -> Callable[[Shape, torch.device], Way]:
    """FlexAttention, compiled, with its mask made beforehand."""

    def make(shape: Shape, device: torch.device) -> Way:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ids, slopes = _ids(shape, device), torch.tensor(position.alibi_slopes(shape.H), device=device)

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
        flex = _compiled(flex_attention, device)
        return lambda q, k, v, kernel=None: [flex(q, k, v, score_mod=score_mod, block_mask=block_mask)]

    return make


def _additive(shape: Shape, device: torch.device) -> Way:
    return lambda q, k, v, w, kernel=None: [attention(q, k, v, score=score.Additive(w), backend=kernel)]


def _broadcast(shape: Shape, device: torch.device) -> Way:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        s = (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) * w.to(q.dtype)).sum(-1)
        return torch.softmax(s.float(), -1).to(v.dtype) @ v

    compiled = _compiled(attend, device)
    return lambda q, k, v, w, kernel=None: [compiled(q, k, v, w)]


def _half(shape: Shape) -> float:
    return shape.B * shape.H * shape.L * (shape.L + 1) / 2


def _strip(shape: Shape, reach: int) -> float:
    return shape.B * shape.H * min(shape.L * reach, shape.L * (shape.L + 1) / 2)


_WORDS: dict[str, tuple[Callable[[Shape, torch.device], dict[str, Any]], Callable[[Shape], float]]] = {
    "window": (lambda s, d: {"mask": mask.causal() & mask.window(_WINDOW - 1, 0)}, lambda s: _strip(s, _WINDOW)),
    "documents": (
        lambda s, d: {"mask": mask.causal() & mask.documents(_ids(s, d))},
        lambda s: _strip(s, _DOCUMENT // 2),
    ),
    "softcap": (lambda s, d: {"mask": mask.causal(), "softcap": _CAP}, _half),
    "ALiBi": (lambda s, d: {"mask": mask.causal(), "bias": position.ALiBi()}, _half),
}
_SUMMARIES = {
    "entropy, lse, max": (Summary(entropy=True, lse=True, max=True), 0.05),
    "top 8": (Summary(top=8), 0.40),
    "top 8, received": (Summary(top=8, received=True), 0.70),
}


def rows() -> list[Row]:
    """What is measured: batches of 16,384 tokens, 2,048 numbers a token."""
    bf16, found = torch.bfloat16, []
    shapes = [Shape(4, 2048 // D, 4096, D) for D in (64, 128)]
    own = _regard(lambda s, d: {"mask": mask.causal()})
    for shape in shapes:
        for backward in (False, True):
            found.append(Row("causal", "torch SDPA", shape, bf16, backward, "ratio", 0.98, own, _sdpa, _qkv, _half))
            for name, (words, pairs) in _WORDS.items():
                found.append(
                    Row(
                        name,
                        "FlexAttention",
                        shape,
                        bf16,
                        backward,
                        "ratio",
                        1.1,
                        _regard(words),
                        _flex(name),
                        _qkv,
                        pairs,
                    )
                )
    without = _regard(lambda s, d: {"mask": mask.causal()}, "triton")  # and not what serves the plain case
    for name, (summary, goal) in _SUMMARIES.items():
        found.append(
            Row(
                name, "the same without", shapes[0], bf16, False, "extra", goal,
                _regard(lambda s, d, summary=summary: {"mask": mask.causal(), "summary": summary}),  # type: ignore[misc]
                without, _qkv, _half,
            )
        )  # fmt: skip
    for L, backward, figure, goal in (
        (4096, False, "ratio", 30.0),
        (4096, False, "elements", 5000.0),
        (1024, True, "ratio", 25.0),
    ):
        shape = Shape(1, 8, L, 64)
        found.append(
            Row(
                "additive", "compiled broadcast", shape, bf16, backward, figure, goal, _additive, _broadcast, _qkvw,
                lambda s: float(s.pairs),
            )
        )  # fmt: skip
    return found


def do_bench(function: Callable[[], object]) -> float:
    """The median of many, in milliseconds."""
    from triton.testing import do_bench as measure

    return float(measure(function, warmup=20, rep=60, return_mode="median"))


def ceilings(device: torch.device, timer: Timer = do_bench, size: int = 8192) -> dict[str, float]:
    """What this GPU does at most, measured, by the names of LIMITS."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = 2 * size**3 / timer(lambda: a @ b) / 1e9
    # As many tanh in a row as hide the way to memory.
    x = torch.randn(size * 512, device=device)

    def chain(x: Tensor) -> Tensor:
        for _ in range(64):
            x = torch.tanh(x)
        return x

    compiled = _compiled(chain, device)
    return {"products": products, "tanh": 64 * x.numel() / timer(lambda: compiled(x)) / 1e6}


def measure(
    rows: Sequence[Row], device: torch.device, limits: dict[str, float], timer: Timer = do_bench
) -> Iterator[Result]:
    """Judge each row, and time it if it is right."""
    for row in rows:
        small = Shape(1, 2, min(row.shape.L, _JUDGED), row.shape.D)
        wrong = error(row.ours(small, device), partial(row.inputs, row, small, device), row.backward)
        if not wrong.within:
            yield Result(row, wrong)
            continue
        torch.manual_seed(0)
        inputs = row.inputs(row, row.shape, device)
        calls = [ready(way(row.shape, device), inputs, row.backward) for way in (row.ours, row.other)]
        times = [[timer(call) for call in calls] for _ in range(_TURNS)]
        ours, other = (statistics.median(x) for x in zip(*times, strict=True))
        work = row.pairs(row.shape) * row.shape.D
        rate = work / ours / 1e6  # elements (i, j, d), in thousand millions a second
        additive = row.other is _broadcast
        passes = 1.0 if additive or not row.backward else 3.5
        share = rate / limits["tanh"] if additive else 4 * rate * passes / limits["products"] / 1e3
        figure = {"ratio": other / ours, "extra": ours / other - 1, "elements": rate}[row.figure]
        yield Result(row, wrong, ours, other, figure, share)


def as_table(results: Sequence[Result], limits: dict[str, float], name: str) -> Table:
    """The table as people read it, with what is met in green."""
    told = ", ".join(f"{limits[key]:,.0f} {unit}" for key, unit in LIMITS.items())
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}, PyTorch {torch.__version__}", caption=f"at most {told}")
    for column in ("", "against", "ms", "theirs", "measured", "goal", "of ceiling", "error (of budget)"):
        table.add_column(column, justify="left" if column in ("", "against") else "right", no_wrap=True)
    for r in results:
        ours, other, share, goal = _cells(r)
        wrong = "" if r.error.within else "bold red"
        table.add_row(
            r.row.label, r.row.against, ours, other, Text(r.written, style="green" if r.met else "red"), goal, share,
            Text(_error(r), style=wrong),
        )  # fmt: skip
    return table


def _cells(r: Result) -> list[str]:
    """Our milliseconds, theirs, the share of the ceiling, and the goal."""
    times = ["-" if x is None else f"{x:.3g}" for x in (r.ours_ms, r.other_ms)]
    return [*times, "-" if r.share is None else f"{r.share:.0%}", FIGURES[r.row.figure].write(r.row.goal)]


def _error(r: Result) -> str:
    return f"{r.error.relative:.0e} ({r.error.share:.0%})"


def as_markdown(results: Sequence[Result], limits: dict[str, float], name: str) -> str:
    """The table as the documentation has it."""
    told = ", ".join(f"{limits[key]:,.0f} {unit}" for key, unit in LIMITS.items())
    lines = [
        f"{name}, PyTorch {torch.__version__}; at most {told}.", "",
        "| | against | ms | theirs | measured | goal | | of the ceiling | error (of budget) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results:
        ours, other, share, goal = _cells(r)
        cells = [r.row.label, r.row.against, ours, other, r.written, goal, "met" if r.met else "not met", share]
        lines.append(f"| {' | '.join([*cells, _error(r)])} |")
    return "\n".join(lines)
