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
    if reconfigure is not None and not is_unicode(stream):
        reconfigure(errors="replace")


def is_unicode(stream: TextIO) -> bool:
    """Whether the encoding of a stream has all characters."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def read_input() -> str:
    """Return the standard input; a closed one is empty.

    Raises:
        ValueError: it is not valid in its encoding.
    """
    if sys.stdin is None or sys.stdin.closed:
        return ""
    try:
        return check_text(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"TEXT: the standard input is not {error.encoding} text; set PYTHONIOENCODING=utf-8"
        ) from error


def check_text(text: str) -> str:
    """Return a text. Raises a ValueError if it holds bytes that could not be decoded."""
    if any("\ud800" <= x <= "\udfff" for x in text):
        raise ValueError("TEXT: is not valid UTF-8; expected a text in UTF-8")
    return text


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
