"""Train a model, and keep it in a directory."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from regard.cli.app import app, console


class Learn(Enum):
    """What can be learned."""

    TRANSLATE = "translate"
    TAG = "tag"
    CLASSIFY = "classify"
    PRONOUNCE = "pronounce"


@app.command()
def train(
    task: Annotated[Learn, typer.Argument(help="What to learn.")],
    out: Annotated[Path, typer.Option(help="The directory for the model.")],
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="translate: a TSV with two columns, or two files of lines; tag: CoNLL-U; classify: a TSV of text and "
            "label; pronounce: nothing, or a TSV. Gzipped or not.",
        ),
    ] = None,
    dev: Annotated[
        list[Path] | None,
        typer.Option(
            help="Examples to choose the best epoch by; twice for two files. [default: one in twenty of DATA]"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="recurrent, transformer or, for tag and classify, conv.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often to go through DATA, at most.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens a step learns from.")] = None,
    rate: Annotated[float | None, typer.Option(help="The largest learning rate.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better result.")] = None,
    width: Annotated[int | None, typer.Option(help="Of a token's vector.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Of feed-forward layers, or of the recurrent state.")] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of the transformer's attention.")] = None,
    cell: Annotated[str | None, typer.Option(help="gru or lstm, of the recurrent model that translates.")] = None,
    dropout: Annotated[float | None, typer.Option(help="The chance that a number is dropped.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens to know, at most.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute products in bfloat16.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that share each batch, such as one a core.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no epoch after so many minutes.")] = None,
) -> None:
    """Train a model on files, and keep the one that does best. Run the same again to go on after an interruption."""
    from regard.tasks.data import split
    from regard.tasks.presets import PRESETS
    from regard.tasks.train import train as run

    preset = PRESETS[task.value]
    kinds = list(preset.settings)
    chosen = model or kinds[0]
    if chosen not in kinds:
        raise ValueError(f"--model: {chosen!r}; expected one of {', '.join(kinds)}, for {task.value}")
    shape = {
        "width": width, "hidden": hidden, "layers": layers, "heads": heads, "cell": cell, "dropout": dropout,
        "vocabulary": vocabulary,
    }  # fmt: skip
    settings = _with(preset.settings[chosen], shape, task.value)
    how = {
        "epochs": epochs, "batch": batch, "rate": rate, "patience": patience, "seed": seed, "bf16": bf16,
        "workers": workers,
    }  # fmt: skip
    training = _with(preset.training[chosen], how, task.value)
    test: list[Any] = []
    if data:
        examples = list(preset.read(data))
        if dev:
            held = list(preset.read(dev))
        else:
            examples, held = split(examples, [0.05])
    elif preset.built_in is None:
        raise ValueError(f"DATA: no file is given; expected some to learn {task.value} from")
    else:
        examples, held, test = split(list(preset.built_in()), [0.05, 0.05])
    with Ticker(training.epochs) as watch:
        watch.say(f"{len(examples):,} examples to learn from, {len(held):,} to choose by; {chosen} model")
        limit = math.inf if minutes is None else 60 * minutes
        made, history = run(preset.task, settings, training, examples, held, out, tell=watch.tell, limit=limit)
    best = history.best
    assert best is not None
    if test:
        (out / "test.tsv").write_text("".join(f"{one.source}\t{one.target}\n" for one in test), encoding="utf-8")
        told = f"{out / 'test.tsv'} has {len(test):,} that were put aside"
        console.print(f"[dim]{told}[/]", soft_wrap=True)
    size = sum(p.numel() for p in made.model.parameters()) / 1e6
    measured = ", ".join(f"{name} {value:.2f}" for name, value in best.dev.items())
    console.print(
        Text.assemble(f"\n{size:.2f} M parameters; epoch {best.number}: {measured}; kept in ", (str(out), "bold"))
    )
    for command in (f"evaluate {out} DATA", f"predict {out} TEXT", f"look {out} TEXT"):
        console.print(f"[dim]  regard {command}[/]", soft_wrap=True)


def _with(preset: Any, given: dict[str, Any], task: str) -> Any:
    """A preset with what was given in its place."""
    given = {name: value for name, value in given.items() if value is not None}
    unknown = given.keys() - {field.name for field in dataclasses.fields(preset)}
    if unknown:
        raise ValueError(f"--{min(unknown)}: the {preset.model} model of {task} has no such setting")
    return dataclasses.replace(preset, **given)


class Ticker:
    """Shows how training goes: a bar for the epoch, and a line for each that is done."""

    def __init__(self, epochs: int | None) -> None:
        self.of = f"/{epochs}" if epochs else ""
        self.bar = Progress(
            SpinnerColumn(), TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None, epoch=1, loss=math.nan, speed=0.0)

    def __enter__(self) -> Ticker:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text)

    def tell(self, news: Any) -> None:
        """Show a step, or an epoch."""
        from regard.tasks.train import Step

        if isinstance(news, Step):
            self.bar.update(
                self.task, completed=news.done, total=news.steps, epoch=news.epoch, loss=news.loss, speed=news.speed
            )
            return
        measured = "  ".join(f"{name} {value:6.2f}" for name, value in news.dev.items())
        mark = ("  ● best", "green") if news.best else ("", "")
        head = f"epoch {news.number:>3}{self.of}  loss {news.loss:.3f}  "
        self.bar.console.print(Text.assemble((head, "dim"), measured, f"  {news.seconds:5.0f} s", mark))
