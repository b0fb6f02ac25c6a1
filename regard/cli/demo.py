"""The tour."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.app import app, console
from regard.cli.bench import compare
from regard.cli.look import show
from regard.cli.train import Ticker
from regard.tasks.open import is_task
from regard.view.alignment import alignment


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page and the plot.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Leave training and the benchmark out.")] = False,
) -> None:
    """The tour: the three stages on one sentence, a look at a real model, one that learns, a benchmark, and one page."""
    from regard.apps.demo import SENTENCE, stages
    from regard.apps.look import look

    out.mkdir(parents=True, exist_ok=True)
    console.rule("[bold]1  The three stages[/]")
    for part in stages():
        console.print(part)
    console.rule("[bold]2  What a real model attends to[/]")
    show(lambda: look(SENTENCE), out / "attention.html")
    if not quick:
        console.rule("[bold]3  A small model learns to pronounce[/]")
        _pronounce(out / "pronounce")
        console.rule("[bold]4  Side by side with its peers[/]")
        compare(None, True, False, out / "bench.png")
    page = (out / "attention.html").resolve()
    console.rule()
    console.print(Text.assemble("Open the page: ", (page.as_uri(), "bold link " + page.as_uri())), soft_wrap=True)


def _pronounce(folder: Path) -> None:
    """Train for a minute, and show where the model looked while it spoke."""
    from regard.apps.demo import SPOKEN, pronounce

    if is_task(folder):  # of an earlier tour
        shutil.rmtree(folder)
    console.print(
        "\nFrom letters to sounds: a recurrent network reads a word, and looks at its letters by additive attention,\n"
        "v . tanh(W q + U k), at every sound that it makes.\n"
    )
    with Ticker(None) as ticker:
        task = pronounce(folder, ticker.tell)
    for made in task.predict(SPOKEN):
        console.print(Text.assemble("\n  ", ("".join(made.source[:-1]), "bold"), "  ", (made.text, "cyan")))
        if made.weights is not None:
            console.print(alignment(made.source, made.target, made.weights), end="")
    console.print(f"\n[dim]  Try others: regard predict {folder} WORD[/]", soft_wrap=True)
