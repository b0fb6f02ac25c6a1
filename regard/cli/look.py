"""The command `look`."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from regard.cli.app import app, console

if TYPE_CHECKING:
    from regard.apps.look import LookResult


@app.command()
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
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("attention.html"),
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

    text = text or []
    if image is None and len(text) == 2 and model is None:
        model = text.pop(0)
    if image is not None:
        if text:
            raise ValueError("--image: TEXT is given too; expected a picture or a text (use --model for the model)")
        show(lambda: look_at_image(image, model, top=top), out, save)
    elif len(text) != 1:
        raise ValueError(f"TEXT: got {len(text)} arguments; expected one text, in quotes, or --image PICTURE")
    elif text[0].endswith(".safetensors") and Path(text[0]).is_file():
        show(lambda: look_at_record(Path(text[0])), out, None)
    else:
        show(lambda: run(sys.stdin.read() if text == ["-"] else text[0], model, top=top), out, save)
    if open_page:
        webbrowser.open(out.resolve().as_uri())


def show(run: Callable[[], LookResult], out: Path, save: Path | None = None) -> None:
    """Run a model, print its attention, write the page, and optionally save the recording."""
    from regard.view.page import page
    from regard.view.terminal import terminal

    for name, path in (("--out", out), ("--save", save)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: the directory {path.parent} does not exist")
    with console.status("loading the model and running it"):
        result = run()
        if save is not None:
            result.recording.save(save)
        document = page(
            result.recording, result.tokens, title=result.model, subtitle=result.text, key_tokens=result.source,
            produced=result.produced, picture=result.picture,
        )  # fmt: skip
    console.print(terminal(result.recording, result.tokens, key_tokens=result.source, produced=result.produced))
    if result.truncated:
        console.print(
            f"[yellow]The last {result.truncated} tokens exceed the model's maximum length and are omitted.[/]"
        )
    if result.note:
        console.print(Text(result.note, style="yellow"))
    out.write_text(document, encoding="utf-8")
    size = out.stat().st_size / 1e6
    console.print(Text.assemble("\nPage: ", (str(out), "bold"), f" ({size:.1f} MB, works offline)"))
