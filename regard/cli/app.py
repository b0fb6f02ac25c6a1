"""The application that the commands are registered in, and the console that they print to."""

from __future__ import annotations

import sys
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from regard.cli.help import GroupedCommands
from regard.version import __version__

app = typer.Typer(
    cls=GroupedCommands,
    help="Attention you can read: every attention mechanism in one call.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help, which takes half the time of help formatted by rich
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(highlight=False, stderr=True, soft_wrap=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Attention you can read: every attention mechanism in one call."""


def progress(hidden: bool) -> Progress:
    """Create a progress bar."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=hidden,
    )  # fmt: skip


def replace_unknown_characters(stream: TextIO) -> None:
    """Let a stream write a question mark where its encoding (ASCII, Latin-1, cp1252) lacks a character."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and not (stream.encoding or "").lower().startswith("utf"):
        reconfigure(errors="replace")


def read_input() -> str:
    """Return the standard input; a closed one is empty."""
    return "" if sys.stdin is None or sys.stdin.closed else sys.stdin.read()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors in the arguments are printed in one line, without a traceback."""
    try:
        for stream in (sys.stdout, sys.stderr):
            replace_unknown_characters(stream)
        given = sys.argv[1:] if arguments is None else arguments
        if given and not {"--help", "-h", "--version"} & {*given}:
            from regard import library

            library.load()
        app(arguments, prog_name="regard")
    except (ValueError, TypeError, ImportError, OSError) as error:
        errors.print(Text.assemble(("regard: ", "bold red"), str(error)))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
