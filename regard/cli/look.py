"""The command `look`."""

from __future__ import annotations

import shlex
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from regard.cli.app import app, check_text, console, read_input
from regard.cli.help import examples
from regard.files import write_atomically

if TYPE_CHECKING:
    from regard.apps.look import LookResult


@app.command(
    epilog=examples(
        'regard look "The animal did not cross the street because it was too tired."',
        'regard look "Any text" --model gpt2 --out page.html --save recording.safetensors',
        "regard look --image cat.jpg --model google/vit-base-patch16-224",
        'regard look tagger "A text for a model of regard train"',
    )
)
def look(
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR] TEXT",
            help="A text, in quotes; - reads standard input. DIR is a directory written by `train`. Alternatively, a "
            "file written by --save.",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="A picture instead of a text, for a vision --model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A local path, or a name on the Hugging Face Hub.", show_default="all-MiniLM-L6-v2, works offline"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the decoder of an encoder-decoder produces.", show_default="generated"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML page to write.", show_default="attention.html, or the next free attention-2.html"),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Number of weights to keep per query.", show_default="all that fit")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Also save the recording in this file, as safetensors.", show_default="not saved"),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show what a model attends to in a text or a picture. Prints an overview, and writes an HTML page."""
    from regard.apps.look import look as run
    from regard.apps.look import look_at_record
    from regard.apps.look_at_image import look_at_image

    text, out = text or [], out or free_path("attention.html")
    if image is None and len(text) == 2 and model is None and Path(text[0]).is_dir():
        model = text.pop(0)
    if image is not None:
        if target is not None:
            raise ValueError("--target: a picture has none; expected no --target")
        if text:
            raise ValueError("--image: TEXT is given too; expected a picture or a text (use --model for the model)")
        show(lambda: look_at_image(image, model, top=top), out, save)
    elif len(text) != 1:
        quoted = f": regard look {shlex.quote(' '.join(text))}" if text else ""
        if len(text) == 2 and "/" in text[0] and " " not in text[0] and not Path(text[0]).exists():
            raise ValueError(f"DIR: there is no directory {text[0]}; expected one written by `train`")
        raise ValueError(
            f"TEXT: got {len(text)} arguments; expected one text, in quotes{quoted}, or --image PICTURE; before the text, "
            "only a directory written by `train`"
        )
    elif text[0].endswith(".safetensors") and Path(text[0]).is_file():
        given = {"--model": model, "--target": target, "--top": top, "--save": save}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(
                f"{unused[0]}: {text[0]} is a recording, to which it does not apply; expected no {unused[0]}"
            )
        if out.resolve() == Path(text[0]).resolve():
            raise ValueError(f"--out: {out} is the recording; expected another file")
        show(lambda: look_at_record(Path(text[0])), out, None)
    else:
        show(
            lambda: run(read_input() if text == ["-"] else not_a_path(text[0]), model, target=target, top=top),
            out,
            save,
        )
    if open_page:
        webbrowser.open(out.resolve().as_uri())


def free_path(name: str) -> Path:
    """Return a path of this name, or with a number behind its stem, that does not exist yet."""
    path, number = Path(name), 2
    while path.exists():
        path = Path(name).with_stem(f"{Path(name).stem}-{number}")
        number += 1
    return path


# The endings of files that are no texts, and the beginnings of paths.
_ENDINGS = (".safetensors", ".gguf", ".html", ".json", ".md", ".txt", ".tsv", ".csv", ".png", ".jpg", ".jpeg", ".webp")
_BEGINNINGS = ("/", "./", "../", "~/")


def is_model(path: Path) -> bool:
    """Whether a directory holds a model of `train` or of transformers."""
    return (path / "config.json").is_file()


def not_a_path(text: str) -> str:
    """Return a text.

    Raises:
        ValueError: it is the path of a file that does not exist, or is no recording.
    """
    check_text(text)
    try:
        is_file = Path(text).expanduser().is_file()
    except (OSError, ValueError):  # too long for a name
        return text
    if Path(text).expanduser().is_dir() and len(text.split()) == 1 and ("/" in text or is_model(Path(text))):
        raise ValueError(f"TEXT: is missing after the directory {text}; expected a text in quotes")
    if is_file:
        raise ValueError(
            f"TEXT: {text} is a file, but no recording; expected a text in quotes, a file written by --save, or --image "
            f"PICTURE (for the text in a file: regard look - < {shlex.quote(text)})"
        )
    if len(text.split()) == 1 and (text.lower().endswith(_ENDINGS) or text.startswith(_BEGINNINGS)):
        raise ValueError(f"TEXT: there is no file {text}; expected a text in quotes, or a file written by --save")
    return text


def show(run: Callable[[], LookResult], out: Path, save: Path | None = None) -> None:
    """Run a model, print its attention, write the page, and optionally save the recording."""
    from regard.view.page import page
    from regard.view.terminal import terminal

    for name, path in (("--out", out), ("--save", save)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: the directory {path.parent} does not exist")
        if path is not None and path.is_dir():
            raise ValueError(f"{name}: {path} is a directory; expected the name of a file")
    if save is not None and save.resolve() == out.resolve():
        raise ValueError(f"--save: {save} is --out, too; expected two different files")
    with console.status("loading the model and running it"):
        result = run()
        recording, notes = result.recording, result.notes
        recording.notes = notes
        if save is not None:
            recording.save(save)
        document = page(
            recording, result.tokens, title=f"What {result.model} attends to",
            subtitle="" if result.picture is None else result.text,  # the page shows a text itself
            key_tokens=result.source, produced=result.produced, picture=result.picture, notes=notes,
        )  # fmt: skip
    console.print(terminal(recording, result.tokens, key_tokens=result.source, produced=result.produced))
    for note in notes:
        console.print(Text(note, style="yellow"))
    write_atomically(out, lambda path: path.write_text(document, encoding="utf-8"))
    size = out.stat().st_size / 1e6
    console.print(Text.assemble("\nPage: ", (str(out), "bold"), f" ({size:.1f} MB, works offline)"), soft_wrap=True)
