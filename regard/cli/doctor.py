"""The command `doctor`."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from regard.cli.app import app, console
from regard.cli.help import examples


@app.command(epilog=examples("regard doctor"))
def doctor() -> None:
    """Show hardware, optional packages, and the backend per problem."""
    import torch

    from regard.apps import doctor as diagnosis

    marks = {True: "[green]●[/]", False: "[red]○[/]", None: "[dim]·[/]"}
    for title, findings in (("This machine", diagnosis.machine()), ("Optional packages", diagnosis.extras())):
        console.print(f"\n[bold]{title}[/]")
        for finding in findings:
            value = escape(finding.value)
            console.print(f"  {marks[finding.well]} {finding.name:<20} {value}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name_of_device = {"cpu": "the CPU", "cuda": "the GPU"}[device]
        console.print(f"\n[bold]Backends on {name_of_device}[/]  [dim]the first that serves a problem is chosen[/]")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
        table.add_column("problem")
        table.add_column("backend")
        table.add_column("why not the others")
        for name, explanation in diagnosis.backends(device).items():
            refusals = [f"{backend}: {reason}" for backend, reason in explanation.reasons.items() if reason]
            table.add_row(name, f"[green]{explanation.chosen}[/]", f"[dim]{'; '.join(refusals) or '-'}[/]")
        console.print(table)
