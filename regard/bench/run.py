"""The measurements of `regard bench`: first correctness, then the median time of interleaved runs of both sides."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from regard.backends.choose import record_backends
from regard.bench.cases import Case, Inputs
from regard.bench.measure import time_interleaved


@dataclass(frozen=True)
class CaseResult:
    """One comparison: the times in milliseconds, and the relative errors against the peer's formula in float64."""

    case: str
    shape: str
    peer: str
    kernel: str
    direction: str
    ours_ms: float
    peer_ms: float
    ours_error: float
    peer_error: float

    @property
    def within_budget(self) -> bool:
        """Whether our error is at most twice the peer's, or eight roundings of the largest element."""
        return self.ours_error <= max(2 * self.peer_error, 8 * torch.finfo(torch.float32).eps)

    @property
    def ratio(self) -> float | None:
        """The peer's time divided by ours; None if our result is wrong."""
        return self.peer_ms / self.ours_ms if self.within_budget else None


def run(cases: Sequence[Case], *, rounds: int = 7, seconds: float = 0.1) -> Iterator[CaseResult]:
    """Measure each case, forward, and forward + backward if it has gradients.

    Args:
        rounds: number of timings per side, of which the median counts.
        seconds: minimum duration of one timing; calls are repeated until it is reached.

    >>> from regard.bench.cases import Case
    >>> from regard.bench.run import run
    >>> def ours(q, k, v):
    ...     return [regard.attention(q, k, v)]
    >>> def peer(q, k, v):
    ...     return [F.scaled_dot_product_attention(q, k, v)]
    >>> case = Case("example", "1x2x9x4", "torch", lambda: [torch.randn(1, 2, 9, 4) for _ in range(3)], ours, peer)
    >>> [(result.direction, result.within_budget) for result in run([case], rounds=1, seconds=0.0)]
    [('forward', True), ('forward + backward', True)]
    """
    for case in cases:
        for backward in (False, True) if case.backward else (False,):
            case.model.eval()
            ours_error, peer_error, kernel = _errors(case, backward)
            case.model.train()
            inputs = case.inputs()
            calls = [partial(_evaluate, f, inputs, backward) for f in (case.ours, case.peer)]
            times = time_interleaved(calls, rounds=(rounds, rounds), burst=seconds)
            ours_ms, peer_ms = (statistics.median(seconds_per_call) * 1e3 for seconds_per_call in times)
            direction = "forward + backward" if backward else "forward"
            yield CaseResult(
                case.name, case.shape, case.peer_name, kernel, direction, ours_ms, peer_ms, ours_error, peer_error
            )


def _errors(case: Case, backward: bool) -> tuple[float, float, str]:
    """Return our error, the peer's error, and the backend that ran.

    The errors are the maxima over two random inputs: with cancellation, the error for one input may be small by chance.
    """
    ours, peers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = case.inputs()
        reference = _evaluate(case.peer, [x.double() for x in inputs], backward)
        with record_backends() as backends:
            ours.append(_error(_evaluate(case.ours, inputs, backward), reference))
        peers.append(_error(_evaluate(case.peer, inputs, backward), reference))
    return max(ours), max(peers), backends[0]


def _evaluate(function: Callable[..., Sequence[Tensor]], inputs: Inputs, backward: bool) -> list[Tensor]:
    """Return the outputs and, if `backward`, the gradients of all inputs."""
    if not backward:
        with torch.no_grad():
            return list(function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad([x.sum() for x in outputs], leaves)
    return [x.detach() for x in outputs] + list(gradients)


def _error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest relative error, where each tensor is scaled by its largest absolute value."""
    pairs = zip(results, reference, strict=True)
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in pairs)


def plot(results: Sequence[CaseResult], path: Path) -> None:
    """Plot the ratios of all cases in a PNG or SVG file."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'regard[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(r, r.ratio) for r in results if r.ratio is not None]
    names = list(dict.fromkeys(r.case for r, _ in shown))
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(names) + 1.6), layout="constrained")
    colors = {"forward": "#2a78d6", "forward + backward": "#1baf7a"}
    for direction, shift in (("forward", -0.19), ("forward + backward", 0.19)):
        rows = [(names.index(r.case) + shift, ratio) for r, ratio in shown if r.direction == direction]
        # Bars start at ratio 1: to the right is faster, to the left slower.
        bars = axes.barh(
            [y for y, _ in rows],
            [ratio - 1 for _, ratio in rows],
            0.34,
            left=1,
            color=colors[direction],
            label=direction,
        )
        for bar, (_, ratio) in zip(bars, rows, strict=True):
            end = (bar.get_x() + bar.get_width()) if ratio >= 1 else 1.0
            axes.annotate(f" {ratio:.1f}x", (end, bar.get_y() + bar.get_height() / 2), va="center", fontsize=8)
    peers = {r.case: r.peer for r, _ in shown}
    axes.set_yticks(range(len(names)), [f"{name}\nagainst {peers[name]}" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.axvline(1, color="#444", linewidth=1)
    axes.set_title("speedup over the peer, one process, interleaved", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
