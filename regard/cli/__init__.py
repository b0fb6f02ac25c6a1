"""The command line: look, serve, train, predict, evaluate, bench, doctor, demo."""

from __future__ import annotations

try:
    # Importing a module registers its commands.
    from regard.cli import bench, demo, doctor, look, predict, serve, train  # noqa: F401
    from regard.cli.app import main
except ImportError as error:
    if error.name not in ("typer", "rich"):
        raise
    raise SystemExit(f"regard: the command line needs {error.name}: pip install 'regard[look]'") from error

__all__ = ["main"]
