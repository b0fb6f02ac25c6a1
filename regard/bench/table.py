"""The results of `regard bench cpu` as a terminal table, as Markdown and as JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from regard.backends.cpu import extension
from regard.bench.goal import METRICS, RowResult
from regard.bench.peak import LIMITS, Peak

_COLORS = {True: "green", False: "red", None: ""}


def machine() -> dict[str, str | int]:
    """Describe the machine and the software that the results depend on."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instructions": extension.instructions()[0],
        "torch": torch.__version__,
        "system": platform.system(),
    }


def _processor() -> str:
    # On Linux, `platform` only gives the architecture.
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _peaks(peaks: Mapping[str, Peak]) -> str:
    return ", ".join(f"{peak.best:.0f} {LIMITS[name]}" for name, peak in peaks.items() if peak.is_available)


def _describe_machine() -> str:
    m = machine()
    return f"{m['threads']} threads, {m['cpu']}, {m['instructions']}, PyTorch {m['torch']}"


def headline(peaks: Mapping[str, Peak]) -> Text:
    """Format the machine and its peaks."""
    return Text.assemble((_describe_machine(), "bold"), f"\npeaks: {_peaks(peaks)}")


LEGEND = (
    "* elements (i, j, d), scaled to a peak of 466 GFLOP/s. Times are medians of interleaved runs; peaks are the best of "
    "interleaved bursts. Errors are against float64, with their share of the budget: twice the error of the plain equation."
)

# Widths of the columns shape, backend, milliseconds, metrics and error: 80 columns in all, the same for every row.
_WIDTHS = (15, 6, 15, 27, 13)


def as_table(results: Sequence[RowResult]) -> Group:
    """Format a row: its name, and one line per shape. Metrics that meet their goals are green, others red."""
    first = results[0]
    title = Text.assemble((first.row, "bold"), (f"  against {first.against}: ", "dim"), (_goals(results), "dim"))
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(width=1)
    for number, width in enumerate(_WIDTHS):
        lines.add_column(width=width, justify="right" if number in (2, 4) else "left")
    for r in results:
        times = "" if r.ours_ms is None else _ms(r.ours_ms) + (f" : {_ms(r.other_ms)}" if r.other_ms else "")
        mark = Text("✓" if r.met else "✗", style=_COLORS[r.met])
        lines.add_row(mark, str(r.shape), r.backend, times, _measured(r), _error(r))
    return Group(title, lines)


def _ms(x: float) -> str:
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.4f}"


def _metric_names(r: RowResult) -> list[str]:
    """Return the names of metrics with goals, and the share of the machine's peak or the work per second."""
    names = [goal.metric for goal in r.goals]
    metrics = r.metrics or {}
    if names[0] == "ratio":
        names += ["share"] if "flops" in metrics else [name for name in ("bytes", "elements") if name in metrics]
    return [name for name in dict.fromkeys(names) if name in metrics]


def _measured(r: RowResult) -> Text:
    if r.metrics is None:
        return Text("none: wrong, over budget", style="bold red")
    parts = [
        Text(METRICS[name].write(r.metrics[name]), style=_COLORS[r.meets(name)] or "dim") for name in _metric_names(r)
    ]
    return Text(", ").join(parts)


def _goals(results: Sequence[RowResult]) -> str:
    goals = [goal for goal in results[0].goals if any(goal.applies(r.shape) for r in results)]
    return ", ".join(map(str, goals))


def _error(r: RowResult) -> Text:
    share = f"{r.error.share:.0%}" if math.isfinite(r.error.share) else "inf"
    return Text(f"{r.error.relative:.0e} ({share})", style="" if r.error.within else "bold red")


def as_markdown(results: Sequence[RowResult], peaks: Mapping[str, Peak]) -> str:
    """Format the results as a Markdown table with one line per row and the range of its metrics."""
    lines = [
        f"{_describe_machine()}; peaks: {_peaks(peaks)}.",
        "",
        "| | against | measured | goal | | error (of budget) |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groupby(results, key=lambda r: r.row):
        lines.append(f"| {' | '.join([name, *_cells(list(group))])} |")
    return "\n".join([*lines, "", LEGEND.replace("*", r"\*", 1)])


def _cells(results: Sequence[RowResult]) -> Iterator[str]:
    worst = max(results, key=lambda r: r.error.share)
    yield results[0].against
    if worst.metrics is None:
        yield f"none: wrong at {worst.shape}"
    else:
        yield ", ".join(_range(results, name) for name in _metric_names(results[0]))
    yield _goals(results)
    missed = [str(r.shape) for r in results if not r.met]
    yield "met" if not missed else "not met" if len(missed) == len(results) else f"not at {', '.join(missed)}"
    yield str(_error(worst))


def _range(results: Sequence[RowResult], name: str) -> str:
    numbers = [r.metrics[name] for r in results if r.metrics and name in r.metrics]
    least, largest = (METRICS[name].write(x) for x in (min(numbers), max(numbers)))
    return least if least == largest else f"{least} to {largest}"


def as_dict(results: Sequence[RowResult], peaks: Mapping[str, Peak]) -> dict[str, object]:
    """Convert the results to JSON types."""
    return {
        "machine": machine(),
        "peaks": {
            name: {"value": peak.best, "unit": LIMITS[name]} for name, peak in peaks.items() if peak.is_available
        },
        "results": [_as_dict(r) for r in results],
    }


def _as_dict(r: RowResult) -> dict[str, object]:
    return {
        "row": r.row, "against": r.against, "shape": vars(r.shape), "kernel": r.backend, "instructions": r.instructions,
        "ours_ms": r.ours_ms, "other_ms": r.other_ms, "figures": r.metrics,
        "error": r.error.relative, "budget_used": r.error.share if math.isfinite(r.error.share) else None,
        "within_budget": r.error.within,
        "goals": [
            {"figure": goal.metric, "bound": goal.bound, "at": goal.at, "met": r.met_goal(goal)}
            for goal in r.goals if goal.applies(r.shape)
        ],
        "met": r.met,
    }  # fmt: skip
