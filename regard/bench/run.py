"""How it is measured: correctness first, then both in turns, and the median of many."""

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
from regard.bench.measure import race


@dataclass(frozen=True)
class Result:
    """One comparison: milliseconds of each, and errors against the peer's formula in float64, relative to its scale."""

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
        """At most twice the peer's error, or a few roundings of the largest number."""
        return self.ours_error <= max(2 * self.peer_error, 8 * torch.finfo(torch.float32).eps)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer; None where the result is not right."""
        return self.peer_ms / self.ours_ms if self.within_budget else None


def run(cases: Sequence[Case], *, rounds: int = 7, seconds: float = 0.1) -> Iterator[Result]:
    """Measure each case, forward, and forward + backward where it has gradients.

    Args:
        rounds: how many times each side is timed, in turns; the median counts.
        seconds: how long one timing takes at least, calls being repeated.
    """
    for case in cases:
        for backward in (False, True) if case.backward else (False,):
            case.model.eval()
            ours_error, peer_error, kernel = _errors(case, backward)
            case.model.train()
            inputs = case.inputs()
            calls = [partial(_outcome, f, inputs, backward) for f in (case.ours, case.peer)]
            times = race(calls, rounds=(rounds, rounds), burst=seconds)
            ours_ms, peer_ms = (statistics.median(taken) * 1e3 for taken in times)
            direction = "forward + backward" if backward else "forward"
            yield Result(
                case.name, case.shape, case.peer_name, kernel, direction, ours_ms, peer_ms, ours_error, peer_error
            )


def _errors(case: Case, backward: bool) -> tuple[float, float, str]:
    """The errors of ours and of the peer, and the kernel that ran. The worst of two draws of the inputs: the error of a
    sum in which much cancels is a matter of luck, and one draw may flatter either side."""
    ours, peers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = case.inputs()
        truth = _outcome(case.peer, [x.double() for x in inputs], backward)
        with record_backends() as kernels:
            ours.append(_error(_outcome(case.ours, inputs, backward), truth))
        peers.append(_error(_outcome(case.peer, inputs, backward), truth))
    return max(ours), max(peers), kernels[0]


def _outcome(function: Callable[..., Sequence[Tensor]], inputs: Inputs, backward: bool) -> list[Tensor]:
    """The outputs, or with backward the outputs and the gradients of all inputs."""
    if not backward:
        with torch.no_grad():
            return list(function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad([x.sum() for x in outputs], leaves)
    return [x.detach() for x in outputs] + list(gradients)


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error relative to the largest number, over all results."""
    errors = [float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in zip(found, truth, strict=True)]
    return max(errors)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw how many times faster each case is than its peer, as PNG or SVG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'regard[bench]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(r, r.ratio) for r in results if r.ratio is not None]
    names = list(dict.fromkeys(r.case for r, _ in shown))
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(names) + 1.6), layout="constrained")
    colours = {"forward": "#2a78d6", "forward + backward": "#1baf7a"}
    for direction, shift in (("forward", -0.19), ("forward + backward", 0.19)):
        rows = [(names.index(r.case) + shift, ratio) for r, ratio in shown if r.direction == direction]
        # Bars start at "as fast": to the right is faster, to the left slower.
        bars = axes.barh(
            [y for y, _ in rows],
            [ratio - 1 for _, ratio in rows],
            0.34,
            left=1,
            color=colours[direction],
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
    axes.set_title("times as fast as the peer, one process, in turns", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
