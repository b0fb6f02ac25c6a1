"""Look at what a model attends to."""

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
            help="Any text, in quotes; - reads standard input. Before it, a directory of `train`. Or a file of `--save`.",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="A picture in place of a text, for a vision --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A local path or a name on the hub. [default: all-MiniLM-L6-v2, offline]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("attention.html"),
    top: Annotated[int | None, typer.Option(min=1, help="Weights to keep per token. [default: all that fit]")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write what was seen here too, as safetensors; look at it again by its name.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """See what a model attends to in a text, or in a picture: here, and on a page."""
    from regard.apps.look import look as run
    from regard.apps.look import look_at_record
    from regard.apps.look_at_image import look_at_image

    text = text or []
    if image is None and len(text) == 2 and model is None:
        model = text.pop(0)
    if image is not None:
        if text:
            raise ValueError("--image: TEXT is given too; expected a picture or a text (--model names the model)")
        show(lambda: look_at_image(image, model, top=top), out, save)
    elif len(text) != 1:
        raise ValueError(f"TEXT: {len(text)} arguments are given; expected one text, in quotes, or --image PICTURE")
    elif text[0].endswith(".safetensors") and Path(text[0]).is_file():
        show(lambda: look_at_record(Path(text[0])), out, None)
    else:
        show(lambda: run(sys.stdin.read() if text == ["-"] else text[0], model, top=top), out, save)
    if open_page:
        webbrowser.open(out.resolve().as_uri())


def show(run: Callable[[], LookResult], out: Path, save: Path | None = None) -> None:
    """Look here, and on a page, at what a run saw; and save it."""
    from regard.view.page import page
    from regard.view.terminal import terminal

    for name, path in (("--out", out), ("--save", save)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: the folder {path.parent} does not exist")
    with console.status("loading the model and running it"):
        looked = run()
        if save is not None:
            looked.watched.save(save)
        document = page(
            looked.watched, looked.tokens, title=looked.model, subtitle=looked.text, key_tokens=looked.source,
            picture=looked.picture,
        )  # fmt: skip
    console.print(terminal(looked.watched, looked.tokens, key_tokens=looked.source))
    if looked.truncated:
        console.print(
            f"[yellow]The last {looked.truncated} tokens are beyond what the model can take, and left out.[/]"
        )
    if looked.note:
        console.print(Text(looked.note, style="yellow"))
    out.write_text(document, encoding="utf-8")
    size = out.stat().st_size / 1e6
    console.print(Text.assemble("\nThe page: ", (str(out), "bold"), f" ({size:.1f} MB, works offline)"))
