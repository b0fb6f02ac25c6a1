"""Tell what can run here."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from regard.cli.app import app, console


@app.command()
def doctor() -> None:
    """Tell what can run here, and why the rest cannot."""
    import torch

    from regard.apps import doctor as look_at

    marks = {True: "[green]●[/]", False: "[red]○[/]", None: "[dim]·[/]"}
    for title, findings in (("This machine", look_at.machine()), ("Optional packages", look_at.extras())):
        console.print(f"\n[bold]{title}[/]")
        for finding in findings:
            value = escape(finding.value)
            console.print(f"  {marks[finding.well]} {finding.name:<20} {value}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        where = {"cpu": "the CPU", "cuda": "the GPU"}[device]
        console.print(f"\n[bold]Which kernel serves what on {where}[/]  [dim]the first that can is taken[/]")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
        table.add_column("problem")
        table.add_column("kernel")
        table.add_column("why not the others")
        for name, explanation in look_at.kernels(device).items():
            refusals = [f"{kernel}: {reason}" for kernel, reason in explanation.reasons.items() if reason]
            table.add_row(name, f"[green]{explanation.chosen}[/]", f"[dim]{'; '.join(refusals) or '-'}[/]")
        console.print(table)
