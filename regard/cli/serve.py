"""The command `serve`."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.app import app, console
from regard.cli.help import examples


@app.command(epilog=examples("regard serve recording.safetensors --open"))
def serve(
    record: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file written by `regard look --save` or `Recording.save`.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 selects any free port.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show a saved recording of any size in the browser. The page is only served to this machine."""
    from regard.apps.look import look_at_record
    from regard.view.data import Data, PageInput
    from regard.view.serve import serving

    with console.status("reading the recording"):
        result = look_at_record(record)
        data = Data([PageInput(result.model, result.recording, result.tokens, result.source, result.produced)])
    with serving(data, f"Attention in {result.model}", port=port, notes=result.notes) as address:
        console.print(Text.assemble("Open ", (address, f"bold link {address}"), "   Ctrl+C stops"), soft_wrap=True)
        if open_page:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print()
