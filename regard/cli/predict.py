"""Use a trained model, and measure it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from regard.cli.app import app, console, progress

_SURE = 0.9


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `regard train` made.")],
    text: Annotated[
        str | None, typer.Argument(help="A text in quotes, or a file with one a line. [default: standard input]")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Translations to follow side by side.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line, for machines.")] = False,
) -> None:
    """What a trained model makes of a text, and where it looked."""
    from regard.tasks.data import read_lines
    from regard.tasks.open import open_task

    task = open_task(folder)
    single = text is not None and not _is_file(text)
    if text is None:
        texts = [line.rstrip("\n") for line in sys.stdin]
    else:
        texts = [text] if single else [line for _, line in read_lines(Path(text))]
    options = {"beams": beams} if task.kind == "translate" else {}
    if single and text is not None and not text.strip():
        raise ValueError("TEXT: is empty; expected some words")
    for one in task.predict(texts, **options):
        if as_json:
            print(json.dumps(_as_dict(one), ensure_ascii=False))
        elif single and console.is_terminal:
            console.print(_shown(task.kind, one))
        else:
            print(_line(task.kind, one))


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `regard train` made.")],
    data: Annotated[list[Path], typer.Argument(help="Files as those of training.")],
    beams: Annotated[int, typer.Option(min=1, help="Translations to follow side by side.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Measure a trained model on examples."""
    from regard.tasks.open import open_task
    from regard.tasks.presets import PRESETS

    task = open_task(folder)
    examples = list(PRESETS[task.kind].read(data))
    options = {"beams": beams} if task.kind == "translate" else {}
    with progress(as_json or not console.is_terminal) as bar:
        row = bar.add_task("measuring", total=len(examples))
        measured = task.evaluate(examples, lambda done, of: bar.update(row, completed=done, total=of), **options)
    if as_json:
        print(json.dumps({"examples": len(examples), **measured}))
        return
    for name, value in measured.items():
        console.print(Text.assemble(f"{name:<14}", (f"{value:6.2f}", "bold")))
    console.print(f"[dim]{len(examples):,} examples[/]")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a text too long to be a name
        return False


def _as_dict(one: Any) -> dict[str, Any]:
    """A prediction as JSON has it."""
    found: dict[str, Any] = one._asdict()
    if found.get("weights") is not None:
        found["weights"] = [
            [round(x, 4) for x in row] for row in found["weights"].reshape(-1, found["weights"].shape[-1]).tolist()
        ]
    return found


def _line(kind: str, one: Any) -> str:
    """A prediction in a line of text."""
    if kind == "translate":
        return str(one.text)
    if kind == "tag":
        return " ".join(f"{word}/{tag}" for word, tag in zip(one.words, one.tags, strict=True))
    return f"{one.label}\t{one.chances[one.label]:.3f}"


def _shown(kind: str, one: Any) -> Text:
    """A prediction for a person to look at."""
    from regard.view.alignment import alignment, shaded

    if kind == "translate":
        return Text.assemble((one.text, "bold"), "\n\n", alignment(one.source, one.target, one.weights))
    if kind == "classify":
        head = (f"{one.label}  ", "bold"), f"{one.chances[one.label]:.0%}\n"
        return Text.assemble(*head, shaded(one.words, one.weights))
    shown = Text()
    for word, tag, chance in zip(one.words, one.tags, one.chances, strict=True):
        shown.append(f"{word} ")
        shown.append(f"{tag}  ", "bold cyan" if chance > _SURE else "yellow")
    return shown
