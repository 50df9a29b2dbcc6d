"""The command that lists the merge methods, those of installed packages included."""

from __future__ import annotations

from typing import Annotated

import typer

from modelweld.cli.app import app, emit, options


@app.command()
def methods(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as README.md and docs/merging.md hold it.")
    ] = False,
) -> None:
    """List the merge methods: what each does, what it merges, how many models, and where it comes from."""
    from rich.table import Table

    from modelweld.methods import table

    if markdown and not options.json:
        typer.echo(table.markdown(), nl=False)
        return
    head, *rows = table.rows()
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    emit(table.document(), shown)
