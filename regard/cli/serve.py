"""Serve a record that is too large for a page."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.app import app, console


@app.command()
def serve(
    record: Annotated[Path, typer.Argument(help="What `regard look --save` or Recording.save wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show a saved record of any size in the browser: to this machine alone, and nothing but the record."""
    from regard.apps.look import look_at_record
    from regard.view.data import Data, PageInput
    from regard.view.serve import serving

    with console.status("reading the record"):
        looked = look_at_record(record)
        data = Data([PageInput(looked.model, looked.watched, looked.tokens, looked.source)])
    with serving(data, looked.model, port=port) as address:
        console.print(Text.assemble("Open ", (address, f"bold link {address}"), "   Ctrl+C ends it"), soft_wrap=True)
        if open_page:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print()
