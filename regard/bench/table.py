"""The table of the native kernels as people and machines read it."""

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
from regard.bench.goal import FIGURES, Result
from regard.bench.peak import LIMITS, Peak

_COLOURS = {True: "green", False: "red", None: ""}


def machine() -> dict[str, str | int]:
    """Where it was measured."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instructions": extension.instructions()[0],
        "torch": torch.__version__,
        "system": platform.system(),
    }


def _processor() -> str:
    # On Linux `platform` knows the family alone.
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _peaks(peaks: Mapping[str, Peak]) -> str:
    return ", ".join(f"{peak.best:.0f} {LIMITS[name]}" for name, peak in peaks.items() if peak.exists)


def _where() -> str:
    here = machine()
    return f"{here['threads']} threads, {here['cpu']}, {here['instructions']}, PyTorch {here['torch']}"


def headline(peaks: Mapping[str, Peak]) -> Text:
    """The machine, and its peaks."""
    return Text.assemble((_where(), "bold"), f"\nat most {_peaks(peaks)}")


LEGEND = (
    "* elements (i, j, d), were the peak 466 GFLOP/s. Times are medians, in turns; peaks, the best of bursts "
    "among them. Errors are against float64, with their share of the budget: twice the error of the equation done straight."
)

# Shape, kernel, milliseconds, what was measured, error: 80 columns, so that rows stand under one another.
_WIDTHS = (15, 6, 15, 27, 13)


def as_table(results: Sequence[Result]) -> Group:
    """A row: its name, and a line per problem, with what is met in green and what is not in red."""
    first = results[0]
    title = Text.assemble((first.row, "bold"), (f"  against {first.against}: ", "dim"), (_goals(results), "dim"))
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(width=1)
    for number, width in enumerate(_WIDTHS):
        lines.add_column(width=width, justify="right" if number in (2, 4) else "left")
    for r in results:
        times = "" if r.ours_ms is None else _ms(r.ours_ms) + (f" : {_ms(r.other_ms)}" if r.other_ms else "")
        mark = Text("✓" if r.met else "✗", style=_COLOURS[r.met])
        lines.add_row(mark, str(r.shape), r.kernel, times, _measured(r), _error(r))
    return Group(title, lines)


def _ms(x: float) -> str:
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.4f}"


def _shown(r: Result) -> list[str]:
    """The figures that something is asked of, and how near to the machine's limit it is, or how much it does a second."""
    names = [goal.figure for goal in r.goals]
    figures = r.figures or {}
    if names[0] == "ratio":
        names += ["share"] if "flops" in figures else [name for name in ("bytes", "elements") if name in figures]
    return [name for name in dict.fromkeys(names) if name in figures]


def _measured(r: Result) -> Text:
    if r.figures is None:
        return Text("none: wrong, over budget", style="bold red")
    parts = [Text(FIGURES[name].write(r.figures[name]), style=_COLOURS[r.meets(name)] or "dim") for name in _shown(r)]
    return Text(", ").join(parts)


def _goals(results: Sequence[Result]) -> str:
    goals = [goal for goal in results[0].goals if any(goal.applies(r.shape) for r in results)]
    return ", ".join(map(str, goals))


def _error(r: Result) -> Text:
    share = f"{r.error.share:.0%}" if math.isfinite(r.error.share) else "inf"
    return Text(f"{r.error.relative:.0e} ({share})", style="" if r.error.within else "bold red")


def as_markdown(results: Sequence[Result], peaks: Mapping[str, Peak]) -> str:
    """A line per row, from its least to its largest figure."""
    lines = [
        f"{_where()}; at most {_peaks(peaks)}.",
        "",
        "| | against | measured | goal | | error (of budget) |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groupby(results, key=lambda r: r.row):
        lines.append(f"| {' | '.join([name, *_cells(list(group))])} |")
    return "\n".join([*lines, "", LEGEND.replace("*", r"\*", 1)])


def _cells(results: Sequence[Result]) -> Iterator[str]:
    worst = max(results, key=lambda r: r.error.share)
    yield results[0].against
    if worst.figures is None:
        yield f"none: wrong at {worst.shape}"
    else:
        yield ", ".join(_range(results, name) for name in _shown(results[0]))
    yield _goals(results)
    missed = [str(r.shape) for r in results if not r.met]
    yield "met" if not missed else "not met" if len(missed) == len(results) else f"not at {', '.join(missed)}"
    yield str(_error(worst))


def _range(results: Sequence[Result], name: str) -> str:
    numbers = [r.figures[name] for r in results if r.figures and name in r.figures]
    least, largest = (FIGURES[name].write(x) for x in (min(numbers), max(numbers)))
    return least if least == largest else f"{least} to {largest}"


def as_dict(results: Sequence[Result], peaks: Mapping[str, Peak]) -> dict[str, object]:
    """All that was measured."""
    return {
        "machine": machine(),
        "peaks": {name: {"value": peak.best, "unit": LIMITS[name]} for name, peak in peaks.items() if peak.exists},
        "results": [_as_dict(r) for r in results],
    }


def _as_dict(r: Result) -> dict[str, object]:
    return {
        "row": r.row, "against": r.against, "shape": vars(r.shape), "kernel": r.kernel, "instructions": r.instructions,
        "ours_ms": r.ours_ms, "other_ms": r.other_ms, "figures": r.figures,
        "error": r.error.relative, "budget_used": r.error.share if math.isfinite(r.error.share) else None,
        "within_budget": r.error.within,
        "goals": [
            {"figure": goal.figure, "bound": goal.bound, "at": goal.at, "met": r.met_goal(goal)}
            for goal in r.goals if goal.applies(r.shape)
        ],
        "met": r.met,
    }  # fmt: skip
