"""The command `demo`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.app import app, console
from regard.cli.bench import compare
from regard.cli.help import examples
from regard.cli.look import show
from regard.cli.train import TrainingDisplay


@app.command(epilog=examples("regard demo --out demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the page and the plot.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Skip training and the benchmark.")] = False,
) -> None:
    """Run a tour of the library. It shows attention step by step, a pretrained model, training, and a benchmark."""
    from regard.apps.demo import SENTENCE, stages
    from regard.apps.look import look

    out.mkdir(parents=True, exist_ok=True)
    console.rule("[bold]1  The three stages[/]")
    for part in stages():
        console.print(part)
    console.rule("[bold]2  What a pretrained model attends to[/]")
    show(lambda: look(SENTENCE), out / "attention.html")
    if not quick:
        console.rule("[bold]3  Training a small model to pronounce words[/]")
        _pronounce(out / "pronounce")
        console.rule("[bold]4  Benchmark against other implementations[/]")
        compare(None, True, False, out / "bench.png")
    page = (out / "attention.html").resolve()
    console.rule()
    console.print(Text.assemble("Open the page: ", (page.as_uri(), "bold link " + page.as_uri())), soft_wrap=True)


def _pronounce(folder: Path) -> None:
    """Train for a minute, and show the alignment of sounds with letters."""
    from regard.apps.demo import SPOKEN, pronounce
    from regard.tasks.open import is_task
    from regard.view.alignment import alignment

    if is_task(folder):  # from an earlier run
        shutil.rmtree(folder)
    console.print(
        "\nA recurrent network maps letters to sounds. For every sound, it attends to the letters by additive attention,\n"
        "v . tanh(W q + U k).\n"
    )
    with TrainingDisplay() as display:
        task = pronounce(folder, display.update)
    for prediction in task.predict(SPOKEN):
        word = "".join(prediction.source[:-1])
        console.print(Text.assemble("\n  ", (word, "bold"), "  ", (prediction.text, "cyan")))
        if prediction.weights is not None:
            console.print(alignment(prediction.source, prediction.target, prediction.weights), end="")
    console.print(f"\n[dim]  Try other words: regard predict {folder} WORD[/]", soft_wrap=True)
