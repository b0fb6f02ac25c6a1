"""The application that the commands are registered in, and the console that they print to."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

app = typer.Typer(
    help="Attention you can read: every attention mechanism in one call.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help, which takes half the time of help formatted by rich
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)


def progress(hidden: bool) -> Progress:
    """Create a progress bar."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=hidden,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors in the arguments are printed in one line, without a traceback."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        if given and "--help" not in given:
            from regard import library

            library.load()
        app(arguments, prog_name="regard")
    except (ValueError, TypeError, ImportError, OSError) as error:
        line = Text.assemble(("regard: ", "bold red"), str(error))
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(2) from error
