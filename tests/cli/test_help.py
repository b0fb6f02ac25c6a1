"""The help of the command line: groups of commands and examples."""

from __future__ import annotations

import shlex

import click
import pytest
import typer.main
from support.command_line import run

from regard.cli.app import app
from regard.cli.help import GROUPS

COMMAND = typer.main.get_command(app)
NAMES = [name for names in GROUPS.values() for name in names]


def leaf(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that `words` call, and its arguments."""
    command, words = COMMAND.commands[words[0]], words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_groups_contain_each_command_once() -> None:
    assert sorted(NAMES) == sorted(COMMAND.commands)
    lines = run("--help").stdout.splitlines()
    starts = [line.split()[0] for line in lines if line.startswith("  ") and line.split()]
    assert [name for name in starts if name in NAMES] == NAMES
    for title in GROUPS:
        assert f"{title}:" in lines


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_examples_that_parse(name: str) -> None:
    """Each line of the examples is a command with arguments that the parser accepts."""
    text = run(name, "--help").stdout
    lines = [line.strip() for line in text.partition("Examples:\n")[2].splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, *words = shlex.split(line.partition(" > ")[0])
        assert program == "regard" and words[0] == name, line
        command, arguments = leaf(words)
        command.make_context(line, list(arguments), resilient_parsing=False)


def test_help_shows_defaults() -> None:
    """Brackets are text, not markup."""
    text = " ".join(run("train", "--help").stdout.split())
    assert "[default: 0]" in text
