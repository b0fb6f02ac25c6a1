"""The command `train`."""

from __future__ import annotations

import dataclasses
import math
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from regard.cli.app import app, console
from regard.cli.help import examples

# The values in `regard.tasks.presets`, which the help cannot import: it would import torch. A test compares the two.
DEFAULTS = {
    "epochs": "translate 20 (recurrent 19); tag 30; classify 15; pronounce 10",
    "batch": "translate 2048; tag 512; classify 1024; pronounce 2048",
    "rate": "translate 0.002; tag 0.001; classify 0.001; pronounce 0.003 (transformer 0.001)",
    "warmup": "400",
    "average": "0.998",
    "patience": "5",
    "width": "translate 256; tag 256; classify 256; pronounce 128",
    "hidden": "translate 512; pronounce 256",
    "layers": "translate 3 (recurrent 1); tag 2; classify 1; pronounce 2 (transformer 3)",
    "heads": "4",
    "cell": "translate gru; pronounce lstm (transformer gru)",
    "dropout": "translate 0.2 (recurrent 0.3); tag 0.4; classify 0.5; pronounce 0.15 (transformer 0.2)",
    "vocabulary": "translate 7500; tag 20000; classify 20000; pronounce 7500",
    "nproc": "1",
}


class TaskName(Enum):
    """The tasks that can be trained."""

    TRANSLATE = "translate"
    TAG = "tag"
    CLASSIFY = "classify"
    PRONOUNCE = "pronounce"


@app.command(
    epilog=examples(
        "regard train classify reviews.tsv --out critic",
        "regard train tag train.conllu --dev dev.conllu --out tagger",
        "regard train translate train.en train.de --out translator --bf16",
    )
)
def train(
    task: Annotated[TaskName, typer.Argument(help="The task to train.")],
    out: Annotated[Path, typer.Option(help="Directory for the trained model.")],
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="translate: a TSV file with two columns, or two files with parallel lines; tag: CoNLL-U; classify: a TSV "
            "file of texts and labels; pronounce: nothing, or a TSV file. Files may be gzipped.",
        ),
    ] = None,
    dev: Annotated[
        list[Path] | None,
        typer.Option(help="Examples that select the best epoch; twice for two files.", show_default="5 % of DATA"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="recurrent, transformer or, for tag and classify, conv.",
            show_default="transformer for translate, recurrent for the others",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Maximum number of epochs; more for small data.", show_default=DEFAULTS["epochs"])
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens per batch, padding included; fewer for small data.", show_default=DEFAULTS["batch"]
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Maximum learning rate.", show_default=DEFAULTS["rate"])] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Number of steps in which the learning rate rises; fewer for small data.",
            show_default=DEFAULTS["warmup"],
        ),
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(
            help="Decay of the moving average of the weights; smaller for small data.", show_default=DEFAULTS["average"]
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many epochs without improvement; more for small data.",
            show_default=DEFAULTS["patience"],
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Embedding dimension.", show_default=DEFAULTS["width"])] = None,
    hidden: Annotated[
        int | None,
        typer.Option(
            help="Dimension of feed-forward layers, or of the recurrent state.", show_default=DEFAULTS["hidden"]
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.", show_default=DEFAULTS["layers"])] = None,
    heads: Annotated[
        int | None, typer.Option(help="Number of attention heads of the transformer.", show_default=DEFAULTS["heads"])
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            help="gru or lstm, of the recurrent models of translate and pronounce.",
            show_default=DEFAULTS["cell"],
        ),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Dropout probability.", show_default=DEFAULTS["dropout"])
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Maximum vocabulary size.", show_default=DEFAULTS["vocabulary"])
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute matrix products in bfloat16.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Number of processes that share each batch, for example one per core.", show_default=DEFAULTS["nproc"]
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(hidden=True)] = None,  # the name of --nproc in version 0.1
    minutes: Annotated[
        float | None, typer.Option(help="Start no epoch after this many minutes, above 0.", show_default="no limit")
    ] = None,
) -> None:
    """Train a model on files, and save the best epoch. The same command resumes an interrupted run."""
    from regard.tasks.presets import PRESETS
    from regard.tasks.split import dev_share, split
    from regard.tasks.train import train as run

    preset = PRESETS[task.value]
    models = list(preset.settings)
    model = model or models[0]
    if model not in models:
        raise ValueError(f"--model: {model!r}; expected one of {', '.join(models)}, for {task.value}")
    if nproc is not None and workers is not None:
        raise ValueError("--workers: --nproc is given too; expected --nproc alone (--workers is its old name)")
    model_options = {
        "width": width, "hidden": hidden, "layers": layers, "heads": heads, "cell": cell, "dropout": dropout,
        "vocabulary": vocabulary,
    }  # fmt: skip
    settings = _override(preset.settings[model], model_options, task.value)
    training_options = {
        "epochs": epochs, "batch": batch, "rate": rate, "warmup": warmup, "average": average, "patience": patience,
    }  # fmt: skip
    fixed = {name for name, value in training_options.items() if value is not None}
    others = {"seed": seed, "bf16": bf16, "workers": workers if nproc is None else nproc}
    training = _override(preset.training[model], {**training_options, **others}, task.value)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes: {minutes}; expected a number above 0")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed: {seed}; expected an integer of 64 bits")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"--dropout: {dropout}; expected a probability from 0 to less than 1")
    test: list[Any] = []
    if data:
        examples = list(preset.read(data))
        if dev:
            dev_examples = list(preset.read(dev))
        else:
            examples, dev_examples = preset.task.hold_out(examples, dev_share(len(examples)))
    elif preset.built_in is None:
        raise ValueError(f"DATA: is missing; expected at least one file of examples for {task.value}")
    else:
        examples, dev_examples, test = split(list(preset.built_in()), [0.05, 0.05])
    with TrainingDisplay() as display:
        display.print(f"{len(examples):,} training examples, {len(dev_examples):,} dev examples; {model} model")
        for remark in preset.task.remarks(examples, dev_examples):
            display.print(Text(remark, style="yellow"))
        limit = math.inf if minutes is None else 60 * minutes
        try:
            trained, history = run(
                preset.task,
                settings,
                training,
                examples,
                dev_examples,
                out,
                tell=display.update,
                limit=limit,
                fixed=fixed,
            )
        except KeyboardInterrupt:
            display.print("\ninterrupted; the same command goes on after the last complete epoch")
            raise typer.Exit(130) from None
    best = history.best
    assert best is not None
    if test:
        lines = (f"{example.source}\t{example.target}\n" for example in test)
        (out / "test.tsv").write_text("".join(lines), encoding="utf-8")
        console.print(f"[dim]{len(test):,} held-out test examples are in {out / 'test.tsv'}[/]", soft_wrap=True)
    size = sum(p.numel() for p in trained.model.parameters()) / 1e6
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in best.dev.items())
    console.print(
        Text.assemble(f"\n{size:.2f} M parameters; epoch {best.number}: {metrics}; saved in ", (str(out), "bold")),
        soft_wrap=True,
    )
    chance = trained.chance(dev_examples)
    if chance is not None and best.dev[trained.metric] <= chance[0]:
        remark = f"{trained.metric} {chance[0]:.2f} is that of always answering {chance[1]!r}: nothing was learned. "
        console.print(Text(f"{remark}More epochs, more data or another --rate may help.", style="yellow"))
    folder = shlex.quote(str(out))
    commands = [f"evaluate {folder} DATA", f"predict {folder} TEXT"]
    if trained.attends_to_words:
        commands.append(f"look {folder} TEXT")
    for command in commands:
        console.print(Text(f"  regard {command}", style="dim"), soft_wrap=True)


def _override(preset: Any, options: dict[str, Any], task: str) -> Any:
    """Replace the values of a preset by the options that are not None."""
    options = {name: value for name, value in options.items() if value is not None}
    unknown = options.keys() - {field.name for field in dataclasses.fields(preset)}
    if unknown:
        raise ValueError(f"--{min(unknown)}: the {preset.model} model of {task} has no such setting")
    return dataclasses.replace(preset, **options)


class TrainingDisplay:
    """A progress bar of the current epoch, and one line per finished epoch."""

    def __init__(self) -> None:
        self.total = ""
        self.bar = Progress(
            SpinnerColumn(), TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None, epoch=1, loss=math.nan, speed=0.0)

    def __enter__(self) -> TrainingDisplay:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def print(self, text: str | Text) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text)

    def update(self, event: Any) -> None:
        """Show a `Start`, a `Step` or an `Epoch`."""
        from regard.tasks.fit import Start
        from regard.tasks.train import Step

        if isinstance(event, Start):
            t = event.training
            self.total = f"/{t.epochs}"
            self.print(
                f"[dim]at most {t.epochs} epochs of {event.steps} steps, batches of {t.batch:,} tokens, learning rate "
                f"{t.rate:g} after {t.warmup} steps, average {t.average:.4g}, patience {t.patience}[/]"
            )
            return
        if isinstance(event, Step):
            self.bar.update(
                self.task,
                completed=event.done,
                total=event.steps,
                epoch=event.epoch,
                loss=event.loss,
                speed=event.speed,
            )
            return
        metrics = "  ".join(f"{name} {value:6.2f}" for name, value in event.dev.items())
        mark = ("  ● best", "green") if event.best else ("", "")
        head = f"epoch {event.number:>3}{self.total}  loss {event.loss:.3f}  "
        self.bar.console.print(Text.assemble((head, "dim"), metrics, f"  {event.seconds:5.0f} s", mark))
