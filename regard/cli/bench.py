"""The command `bench` and its subcommands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from regard.cli.app import app, console, progress
from regard.cli.help import examples

if TYPE_CHECKING:
    from regard.bench.cases import Case

bench_app = typer.Typer(
    invoke_without_command=True,
    epilog=examples(
        "regard bench --only causal", "regard bench --plot bench.png", "regard bench cpu", "regard bench watch"
    ),
)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    only: Annotated[
        str | None, typer.Option(help="Run only cases whose names contain this text.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Run fewer and shorter rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the ratios in this PNG or SVG file.", show_default="no plot")
    ] = None,
) -> None:
    """Compare the speed of regard and other implementations. Wrong results have no ratio."""
    if context.invoked_subcommand is None:
        compare(only, quick, as_json, plot)


@bench_app.command()
def steps(
    quick: Annotated[bool, typer.Option(help="Run fewer and shorter rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare training steps of models with our attention and with PyTorch's."""
    from regard.bench.steps import steps as cases

    compare(None, quick, as_json, None, cases())


@bench_app.command()
def digits(
    seeds: Annotated[int, typer.Option(min=1, help="Number of networks to train per layer.")] = 10,
    only: Annotated[
        str | None,
        typer.Option(
            help="Run only layers whose names contain this text, and the network without one.", show_default="all"
        ),
    ] = None,
) -> None:
    """Compare the layers of `regard.nn.vision` in a small network for digits. Takes minutes."""
    from regard.bench.digits import NONE, VARIANTS, measure, table

    names = [name for name in VARIANTS if only is None or only.lower() in name.lower() or name == NONE]
    results = []
    with progress(not console.is_terminal) as bar:
        row = bar.add_task("training", total=seeds * len(names))
        for result in measure(range(seeds), names):
            results.append(result)
            bar.update(row, advance=1, description=f"{result.variant}, seed {result.seed}")
    print(table(results))


@bench_app.command()
def cpu(
    rows: Annotated[
        str | None,
        typer.Option(
            help="Run only rows whose names contain one of these comma-separated texts.",
            show_default="all except the slow `length` rows",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of both sides.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Approximate time per problem.")] = 1.5,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this JSON file.", show_default="not written")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table, as in the README.")] = False,
) -> None:
    """Compare the native CPU kernels with PyTorch, their goals and the peaks of this machine."""
    import torch

    from regard.bench.cpu import measure, select_rows
    from regard.bench.table import LEGEND, as_dict, as_markdown, as_table, headline

    selected = select_rows(rows)
    torch.set_num_threads(threads)
    results = []
    with progress(not console.is_terminal) as bar:
        task = bar.add_task("peaks of this machine", total=sum(len(row.shapes) for row in selected))
        peaks, measurements = measure(selected, seconds, threads)
        for row in selected:
            for shape in row.shapes:
                bar.update(task, description=f"{row.name} ({shape})")
                results.append(next(measurements))
                bar.advance(task)
            if not markdown:
                console.print(as_table(results[-len(row.shapes) :]))
    if markdown:
        print(as_markdown(results, peaks))
    else:
        console.print(headline(peaks))
        console.print(LEGEND, style="dim")
    if as_json is not None:
        as_json.write_text(json.dumps(as_dict(results, peaks), indent=1) + "\n", encoding="utf-8")
    if not all(result.error.within for result in results):
        raise typer.Exit(1)


@bench_app.command()
def gpu(
    only: Annotated[
        str | None, typer.Option(help="Run only rows whose names contain this text.", show_default="all")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table, as in the documentation.")] = False,
) -> None:
    """Compare the GPU kernels with PyTorch's. Wrong results are not timed. Takes minutes."""
    import torch

    from regard.bench.gpu import as_markdown, as_table, measure, measure_peaks, rows

    if not torch.cuda.is_available():
        raise ValueError(
            "PyTorch finds no GPU; expected at least one (`make test` checks the GPU kernels without a GPU)"
        )
    selected = [row for row in rows() if only is None or only.lower() in row.name.lower()]
    if not selected:
        names = ", ".join({row.name: None for row in rows()})
        raise ValueError(f"--only: no row name contains {only!r}; the rows are {names}")
    device, name, results = torch.device("cuda"), torch.cuda.get_device_name(), []
    with progress(not console.is_terminal) as bar:
        task = bar.add_task("peaks of this GPU", total=len(selected))
        peaks = measure_peaks(device)
        for result in measure(selected, device, peaks):
            results.append(result)
            bar.update(task, advance=1, description=result.row.label)
    if markdown:
        print(as_markdown(results, peaks, name))
    else:
        console.print(as_table(results, peaks, name))
    if not all(result.error.within for result in results):
        raise typer.Exit(1)


@bench_app.command()
def watch(
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    longest: Annotated[int, typer.Option(min=512, help="Skip texts with more tokens than this.")] = 16384,
) -> None:
    """Measure the time and memory that `regard.watch` adds to a model, and those of returning all weights."""
    from regard.bench.watch import CASES, STEPS, measure, measure_steps

    cases = [case for case in CASES if case.tokens <= longest]
    steps = [case for case in STEPS if case.keys <= longest]
    table = Table(box=box.SIMPLE_HEAD, title=f"{threads} threads; ms, and MiB in addition to the model")
    for name in ("model", "tokens", "plain", "watched", "eager", "watched : plain", "MiB", "plain"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    notes = []
    with progress(not console.is_terminal) as bar:
        row = bar.add_task("measuring", total=len(cases) + len(steps))
        for result in measure(cases, threads):
            case = result.case
            style = "green" if result.ratio <= case.goal else "yellow"
            sizes = [result.watched_memory, result.unwatched_memory]
            table.add_row(
                case.model, f"{case.tokens:,}", f"{result.unwatched_ms:.0f}", f"{result.watched_ms:.0f}",
                "-" if result.eager_ms is None else f"{result.eager_ms:.0f}",
                Text(f"{result.ratio:.2f}x (≤ {case.goal})", style=style),
                *("-" if size is None else f"{size / 2**20:.0f}" for size in sizes),
            )  # fmt: skip
            weights = "" if result.weights_error is None else f", of the weights {result.weights_error:.0e}"
            notes.append(
                f"  [dim]{case.model}, {case.tokens:,} tokens: error of the output {result.error:.0e}{weights}[/]"
            )
            bar.advance(row)
        decoding = Table(box=box.SIMPLE_HEAD, title=f"One step of decoding; {threads} threads, microseconds")
        for name in ("model", "keys", "plain", "watched", "watched : plain"):
            decoding.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
        for step in measure_steps(steps, threads):
            style = "green" if step.ratio <= step.case.goal else "yellow"
            decoding.add_row(
                step.case.model, f"{step.case.keys:,}", f"{step.unwatched_us:.0f}", f"{step.watched_us:.0f}",
                Text(f"{step.ratio:.2f}x (≤ {step.case.goal})", style=style),
            )  # fmt: skip
            bar.advance(row)
    console.print(table)
    for note in notes:
        console.print(note)
    console.print(decoding)


def compare(
    only: str | None, quick: bool, as_json: bool, plot: Path | None, cases: Sequence[Case] | None = None
) -> None:
    """Measure cases, by default those of the README, and print or plot the results."""
    import torch

    from regard.bench.cases import cases as all_cases
    from regard.bench.run import plot as draw
    from regard.bench.run import run

    every = all_cases() if cases is None else cases
    selected = [case for case in every if only is None or only.lower() in case.name.lower()]
    if not selected:
        raise ValueError(f"--only: no case name contains {only!r}; the cases are {', '.join(c.name for c in every)}")
    results = []
    rounds, seconds = (3, 0.02) if quick else (9, 0.1)
    with progress(as_json) as bar:
        task = bar.add_task("measuring", total=sum(1 + case.backward for case in selected))
        for result in run(selected, rounds=rounds, seconds=seconds):
            results.append(result)
            bar.update(task, advance=1, description=result.case)
    if as_json:
        print(json.dumps([{**asdict(r), "ratio": r.ratio} for r in results], indent=1))
    else:
        table = Table(box=box.SIMPLE_HEAD, title=f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
        for name, side in (
            ("case", "left"),
            ("", "left"),
            ("backend", "left"),
            ("regard ms", "right"),
            ("peer ms", "right"),
        ):
            table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("speedup", no_wrap=True)
        for r in results:
            forward = r.direction == "forward"
            table.add_row(
                r.case if forward else "", "fwd" if forward else "+ bwd", r.kernel,
                f"{r.ours_ms:.1f}", f"{r.peer_ms:.1f}", _bar(r.ratio),
            )  # fmt: skip
        console.print(table)
        for case in {r.case: None for r in results}:
            rows = [r for r in results if r.case == case]
            errors = f"error {max(r.ours_error for r in rows):.0e}, peer's {max(r.peer_error for r in rows):.0e}"
            console.print(f"  [dim]{case}: {rows[0].shape}, against {rows[0].peer}; {errors}[/]")
    if plot is not None:
        draw(results, plot)
        if not as_json:
            console.print(f"\nPlot: [bold]{plot}[/]")


def _bar(ratio: float | None) -> Text:
    """Format a ratio as a bar of two cells per unit."""
    if ratio is None:
        return Text("none: wrong", style="red")
    color = "green" if ratio >= 1.05 else "yellow" if ratio >= 0.95 else "red"
    return Text.assemble((f"{ratio:5.2f}x ", "bold"), ("█" * max(1, min(round(ratio * 2), 8)), color))
