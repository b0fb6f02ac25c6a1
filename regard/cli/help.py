"""The layout of `--help`: commands in groups, and examples at the end."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

# The commands of `regard`, in the order of `regard --help`; a test compares them with the registered ones.
GROUPS = {
    "Look at attention": ("look", "serve"),
    "Train models for tasks": ("train", "predict", "evaluate"),
    "Learn and measure": ("demo", "doctor", "bench"),
}


class GroupedCommands(TyperGroup):
    """Commands that `--help` lists in the groups of `GROUPS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of the groups."""
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group."""
        for title, names in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            limit = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
            with formatter.section(title):
                formatter.write_dl(
                    [(name, command.get_short_help_str(limit)) for name, command in commands if command is not None]
                )


def examples(*lines: str) -> str:
    """Return the epilog of a command that shows examples, which are not wrapped.

    >>> examples("regard doctor").splitlines()[1:]
    ['Examples:', '  regard doctor']
    """
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))
