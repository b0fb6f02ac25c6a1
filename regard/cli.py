"""The command line: look, bench, doctor, demo."""

from __future__ import annotations

import json
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

try:
    import rich
    import typer
except ImportError as error:  # pragma: no cover - a test runs this line in a bare interpreter of its own
    raise SystemExit(f"regard: the command line needs {error.name}: pip install 'regard[look]'") from error

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="Attention you can read: every attention mechanism in one call.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)


@app.command()
def look(
    text: Annotated[str, typer.Argument(help="Any text, in quotes; - reads standard input.")],
    model: Annotated[
        str | None, typer.Option(help="A local path or a name on the hub. [default: all-MiniLM-L6-v2, offline]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("attention.html"),
    top: Annotated[int | None, typer.Option(min=1, help="Weights to keep per token. [default: all that fit]")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """See what a transformer attends to in a text: here, and on a page."""
    _look(sys.stdin.read() if text == "-" else text, model, out, top)
    if open_page:
        webbrowser.open(out.resolve().as_uri())


def _look(text: str, model: str | None, out: Path, top: int | None = None) -> None:
    from regard.look import look as run
    from regard.view.page import page
    from regard.view.terminal import terminal

    if not out.parent.is_dir():
        raise ValueError(f"--out: the folder {out.parent} does not exist")
    with console.status("loading the model and reading the text"):
        looked = run(text, model, top=top)
        document = page(looked.watched, looked.tokens, title=looked.model, subtitle=looked.text)
    console.print(terminal(looked.watched, looked.tokens))
    if looked.truncated:
        console.print(
            f"[yellow]The last {looked.truncated} tokens are beyond what the model can take, and left out.[/]"
        )
    out.write_text(document, encoding="utf-8")
    size = out.stat().st_size / 1e6
    console.print(Text.assemble("\nThe page: ", (str(out), "bold"), f" ({size:.1f} MB, works offline)"))


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
        _bench(only, quick, as_json, plot)


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
    with _progress(not console.is_terminal) as progress:
        task = progress.add_task("the peaks of this machine", total=sum(len(row.shapes) for row in picked))
        peaks, found = measure(picked, seconds, threads)
        for row in picked:
            for shape in row.shapes:
                progress.update(task, description=f"{row.name} ({shape})")
                results.append(next(found))
                progress.advance(task)
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


def _bench(only: str | None, quick: bool, as_json: bool, plot: Path | None) -> None:
    import torch

    from regard.bench.cases import cases
    from regard.bench.run import plot as draw
    from regard.bench.run import run

    chosen = [case for case in cases() if only is None or only.lower() in case.name.lower()]
    if not chosen:
        raise ValueError(f"--only: no case has {only!r} in its name; there are {', '.join(c.name for c in cases())}")
    results = []
    rounds, seconds = (3, 0.02) if quick else (9, 0.1)
    with _progress(as_json) as progress:
        task = progress.add_task("measuring", total=sum(1 + case.backward for case in chosen))
        for result in run(chosen, rounds=rounds, seconds=seconds):
            results.append(result)
            progress.update(task, advance=1, description=result.case)
    if as_json:
        print(json.dumps([{**asdict(r), "ratio": r.ratio} for r in results], indent=1))
    else:
        table = Table(box=rich.box.SIMPLE_HEAD, title=f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
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


def _progress(hidden: bool) -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=hidden,
    )  # fmt: skip


@app.command()
def doctor() -> None:
    """Tell what can run here, and why the rest cannot."""
    from regard import doctor as look_at

    marks = {True: "[green]●[/]", False: "[red]○[/]", None: "[dim]·[/]"}
    for title, findings in (("This machine", look_at.machine()), ("Optional packages", look_at.extras())):
        console.print(f"\n[bold]{title}[/]")
        for finding in findings:
            value = rich.markup.escape(finding.value)
            console.print(f"  {marks[finding.well]} {finding.name:<20} {value}")
    console.print("\n[bold]Which kernel serves what[/]  [dim]the first that can is taken[/]")
    table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    table.add_column("problem")
    table.add_column("kernel")
    table.add_column("why not the others")
    for name, explanation in look_at.kernels().items():
        refusals = [f"{kernel}: {reason}" for kernel, reason in explanation.reasons.items() if reason]
        table.add_row(name, f"[green]{explanation.chosen}[/]", f"[dim]{'; '.join(refusals) or '-'}[/]")
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page and the plot.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Leave the benchmark out.")] = False,
) -> None:
    """The tour: the three stages on one sentence, a look at a real model, a benchmark, and one page."""
    from regard.demo import SENTENCE, stages

    out.mkdir(parents=True, exist_ok=True)
    console.rule("[bold]1  The three stages[/]")
    for part in stages():
        console.print(part)
    console.rule("[bold]2  What a real model attends to[/]")
    _look(SENTENCE, None, out / "attention.html")
    if not quick:
        console.rule("[bold]3  Side by side with its peers[/]")
        _bench(None, True, False, out / "bench.png")
    page = (out / "attention.html").resolve()
    console.rule()
    console.print(Text.assemble("Open the page: ", (page.as_uri(), "bold link " + page.as_uri())), soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what goes wrong with an argument is one line, no traceback."""
    try:
        app(arguments, prog_name="regard")
    except (ValueError, TypeError, ImportError, OSError) as error:
        Console(stderr=True, highlight=False).print(Text.assemble(("regard: ", "bold red"), str(error)))
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
