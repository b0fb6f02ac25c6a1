"""Measure regard and its peers side by side."""

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

if TYPE_CHECKING:
    from regard.bench.cases import Case

measured = typer.Typer(invoke_without_command=True)
app.add_typer(measured, name="bench")


@measured.callback()
def bench(
    context: typer.Context,
    only: Annotated[str | None, typer.Option(help="Only the cases whose name holds this word.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer and shorter rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios here, as PNG or SVG.")] = None,
) -> None:
    """Measure regard and its peers side by side, in one process. A wrong result gets no ratio."""
    if context.invoked_subcommand is None:
        compare(only, quick, as_json, plot)


@measured.command()
def steps(
    quick: Annotated[bool, typer.Option(help="Fewer and shorter rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Training steps of whole models, on our attention and on torch's own."""
    from regard.bench.steps import steps as cases

    compare(None, quick, as_json, None, cases())


@measured.command()
def digits(
    seeds: Annotated[int, typer.Option(min=1, help="How many networks of each kind are trained.")] = 10,
    only: Annotated[str | None, typer.Option(help="Only the layers whose name holds this word, and none.")] = None,
) -> None:
    """What the layers of `regard.nn.vision` do for a small network that reads digits: minutes of training."""
    from regard.bench.digits import NONE, VARIANTS, measure, table

    names = [name for name in VARIANTS if only is None or only.lower() in name.lower() or name == NONE]
    results = []
    with progress(not console.is_terminal) as bar:
        row = bar.add_task("training", total=seeds * len(names))
        for result in measure(range(seeds), names):
            results.append(result)
            bar.update(row, advance=1, description=f"{result.variant}, seed {result.seed}")
    print(table(results))


@measured.command()
def cpu(
    rows: Annotated[
        str | None,
        typer.Option(help="Only the rows whose names hold one of these words, by commas. `length` runs by name alone."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for both sides.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each problem is timed, about.")] = 1.5,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all that was measured here, for machines.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as the README has it.")] = False,
) -> None:
    """The native CPU kernels against what they are to reach, and the peaks of this machine. A wrong result gets no ratio."""
    import torch

    from regard.bench.cpu import chosen, measure
    from regard.bench.table import LEGEND, as_dict, as_markdown, as_table, headline

    picked = chosen(rows)
    torch.set_num_threads(threads)
    results = []
    with progress(not console.is_terminal) as bar:
        task = bar.add_task("the peaks of this machine", total=sum(len(row.shapes) for row in picked))
        peaks, found = measure(picked, seconds, threads)
        for row in picked:
            for shape in row.shapes:
                bar.update(task, description=f"{row.name} ({shape})")
                results.append(next(found))
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


@measured.command()
def gpu(
    only: Annotated[str | None, typer.Option(help="Only the rows whose names hold this word.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as the documentation has it.")] = False,
) -> None:
    """The kernels of the GPU against PyTorch's own: what is right is timed. It takes some minutes."""
    import torch

    from regard.bench.gpu import as_markdown, as_table, ceilings, measure, rows

    if not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU that PyTorch sees; expected one to measure (`make test` checks the kernels without)"
        )
    chosen = [row for row in rows() if only is None or only.lower() in row.name.lower()]
    if not chosen:
        raise ValueError(f"--only: no row has {only!r} in its name; there are {', '.join({r.name: 0 for r in rows()})}")
    device, name, results = torch.device("cuda"), torch.cuda.get_device_name(), []
    with progress(not console.is_terminal) as bar:
        task = bar.add_task("the ceilings of this GPU", total=len(chosen))
        limits = ceilings(device)
        for result in measure(chosen, device, limits):
            results.append(result)
            bar.update(task, advance=1, description=result.row.label)
    if markdown:
        print(as_markdown(results, limits, name))
    else:
        console.print(as_table(results, limits, name))
    if not all(result.error.within for result in results):
        raise typer.Exit(1)


@measured.command()
def watch(
    threads: Annotated[int, typer.Option(min=1, help="Threads for all sides.")] = 2,
    longest: Annotated[int, typer.Option(min=512, help="Leave out texts of more tokens.")] = 16384,
) -> None:
    """What watching a model costs, in time and memory, beside the model unwatched and asked for all its weights."""
    from regard.bench.watch import LENGTHS, measure

    chosen = [length for length in LENGTHS if length.tokens <= longest]
    table = Table(box=box.SIMPLE_HEAD, title=f"{threads} threads; ms, and MiB beyond the model")
    for name in ("model", "tokens", "plain", "watched", "eager", "watched : plain", "MiB", "plain"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    notes = []
    with progress(not console.is_terminal) as bar:
        row = bar.add_task("measuring", total=len(chosen))
        for result in measure(chosen, threads):
            length = result.length
            style = "green" if result.ratio <= length.goal else "yellow"
            sizes = [result.watched_memory, result.unwatched_memory]
            table.add_row(
                length.model, f"{length.tokens:,}", f"{result.unwatched_ms:.0f}", f"{result.watched_ms:.0f}",
                "-" if result.eager_ms is None else f"{result.eager_ms:.0f}",
                Text(f"{result.ratio:.2f}x (≤ {length.goal})", style=style),
                *("-" if size is None else f"{size / 2**20:.0f}" for size in sizes),
            )  # fmt: skip
            told = "" if result.weights_error is None else f", weights {result.weights_error:.0e} beside the eager ones"
            notes.append(f"  [dim]{length.model}, {length.tokens:,} tokens: output within {result.error:.0e}{told}[/]")
            bar.advance(row)
    console.print(table)
    for note in notes:
        console.print(note)


def compare(
    only: str | None, quick: bool, as_json: bool, plot: Path | None, cases: Sequence[Case] | None = None
) -> None:
    """Measure cases, by default those of the README, and print or draw the results."""
    import torch

    from regard.bench import cases as known
    from regard.bench.run import plot as draw
    from regard.bench.run import run

    every = known.cases() if cases is None else cases
    chosen = [case for case in every if only is None or only.lower() in case.name.lower()]
    if not chosen:
        raise ValueError(f"--only: no case has {only!r} in its name; there are {', '.join(c.name for c in every)}")
    results = []
    rounds, seconds = (3, 0.02) if quick else (9, 0.1)
    with progress(as_json) as bar:
        task = bar.add_task("measuring", total=sum(1 + case.backward for case in chosen))
        for result in run(chosen, rounds=rounds, seconds=seconds):
            results.append(result)
            bar.update(task, advance=1, description=result.case)
    if as_json:
        print(json.dumps([{**asdict(r), "ratio": r.ratio} for r in results], indent=1))
    else:
        table = Table(box=box.SIMPLE_HEAD, title=f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
        for name, side in (
            ("case", "left"),
            ("", "left"),
            ("kernel", "left"),
            ("regard ms", "right"),
            ("peer ms", "right"),
        ):
            table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("times as fast", no_wrap=True)
        for r in results:
            forward = r.direction == "forward"
            table.add_row(
                r.case if forward else "", "fwd" if forward else "+ bwd", r.kernel,
                f"{r.ours_ms:.1f}", f"{r.peer_ms:.1f}", _bar(r.ratio),
            )  # fmt: skip
        console.print(table)
        for case in {r.case: None for r in results}:
            rows = [r for r in results if r.case == case]
            errors = f"error {max(r.ours_error for r in rows):.0e}, theirs {max(r.peer_error for r in rows):.0e}"
            console.print(f"  [dim]{case}: {rows[0].shape}, against {rows[0].peer}; {errors}[/]")
    if plot is not None:
        draw(results, plot)
        if not as_json:
            console.print(f"\nThe plot: [bold]{plot}[/]")


def _bar(ratio: float | None) -> Text:
    """A ratio as a bar that is one cell long where both are as fast."""
    if ratio is None:
        return Text("none: wrong", style="red")
    colour = "green" if ratio >= 1.05 else "yellow" if ratio >= 0.95 else "red"
    return Text.assemble((f"{ratio:5.2f}x ", "bold"), ("█" * max(1, min(round(ratio * 2), 8)), colour))
