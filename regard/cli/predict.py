"""The commands `predict` and `evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from regard.cli.app import app, check_text, console, errors, is_unicode, progress, read_input
from regard.cli.help import examples

# Tags of a higher probability are shown as certain.
_CERTAIN = 0.9


@app.command(
    epilog=examples(
        'regard predict critic "A wonderful film."',
        "regard predict tagger sentences.txt --json > tags.jsonl",
    )
)
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory written by `regard train`.")],
    text: Annotated[
        str | None,
        typer.Argument(help="A text in quotes, or a file with one text per line.", show_default="standard input"),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam size of translation.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Predict with a trained model, and show its attention."""
    from regard.tasks.lines import read_lines
    from regard.tasks.open import open_task

    task = open_task(folder)
    single = text is not None and not _is_file(text)
    if text is None:
        given = read_input()
        texts = given.removesuffix("\n").split("\n") if given else []
    else:
        texts = [_not_a_path(check_text(text))] if single else [line for _, line in read_lines(Path(text))]
    options = {"beams": beams} if task.kind == "translate" else {}
    if single and text is not None and not text.strip():
        raise ValueError("TEXT: is empty; expected at least one word")
    for remark in task.remarks_on_texts(texts):
        errors.print(Text(remark, style="yellow"))
    for prediction in task.predict(texts, **options):
        if as_json:
            print(json.dumps(_as_dict(prediction), ensure_ascii=not is_unicode(sys.stdout)))
        elif single and console.is_terminal:
            console.print(_as_rich_text(task.kind, prediction))
        else:
            print(_as_line(task.kind, prediction))


@app.command(
    epilog=examples(
        "regard evaluate critic test.tsv",
        "regard evaluate translator test.en test.de --beams 1",
    )
)
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory written by `regard train`.")],
    data: Annotated[list[Path], typer.Argument(help="Files in the format of the training data.")],
    beams: Annotated[int, typer.Option(min=1, help="Translations to follow side by side.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Evaluate a trained model on examples."""
    from regard.tasks.open import open_task
    from regard.tasks.presets import PRESETS

    task = open_task(folder)
    examples = list(PRESETS[task.kind].read(data))
    options = {"beams": beams} if task.kind == "translate" else {}
    with progress(as_json or not console.is_terminal) as bar:
        row = bar.add_task("evaluating", total=len(examples))
        metrics = task.evaluate(examples, lambda done, total: bar.update(row, completed=done, total=total), **options)
    if as_json:
        print(json.dumps({"examples": len(examples), **metrics}))
        return
    for name, value in metrics.items():
        console.print(Text.assemble(f"{name:<14}", (f"{value:6.2f}", "bold")))
    console.print(f"[dim]{len(examples):,} examples[/]")


def _not_a_path(text: str) -> str:
    """Return a text. Raises a ValueError if it is the path of a file that does not exist."""
    if len(text.split()) == 1 and text.lower().endswith((".txt", ".tsv", ".csv", ".md", ".conllu", ".gz")):
        raise ValueError(f"TEXT: there is no file {text}; expected a text in quotes, or a file with one text per line")
    return text


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False


def _as_dict(prediction: Any) -> dict[str, Any]:
    """Convert a prediction to JSON types."""
    fields: dict[str, Any] = prediction._asdict()
    if fields.get("weights") is not None:
        rows = fields["weights"].reshape(-1, fields["weights"].shape[-1]).tolist()
        fields["weights"] = [[round(x, 4) for x in row] for row in rows]
    return fields


def _as_line(kind: str, prediction: Any) -> str:
    """Format a prediction in one line of plain text."""
    if kind == "translate":
        return str(prediction.text)
    if kind == "tag":
        return " ".join(f"{word}/{tag}" for word, tag in zip(prediction.words, prediction.tags, strict=True))
    return f"{prediction.label}\t{prediction.chances[prediction.label]:.3f}"


def _as_rich_text(kind: str, prediction: Any) -> Text:
    """Format a prediction, with its attention, for the terminal."""
    from regard.view.alignment import alignment, shaded

    if kind == "translate":
        weights = alignment(prediction.source, prediction.target, prediction.weights)
        return Text.assemble((prediction.text, "bold"), "\n\n", weights)
    if kind == "classify":
        head = (f"{prediction.label}  ", "bold"), f"{prediction.chances[prediction.label]:.0%}\n"
        return Text.assemble(*head, shaded(prediction.words, prediction.weights))
    text = Text()
    for word, tag, probability in zip(prediction.words, prediction.tags, prediction.chances, strict=True):
        text.append(f"{word} ")
        text.append(f"{tag}  ", "bold cyan" if probability > _CERTAIN else "yellow")
    return text
