"""pin: resolve every source to something immutable."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelweld.cli.app import app, emit

if TYPE_CHECKING:
    from rich.table import Table

    from modelweld.sources import Change, Lock


@app.command()
def pin(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 when a source is not what the lock says.")
    ] = False,
    params: Annotated[Path, typer.Option("--params", help="The pipeline's parameters.")] = Path("params.yaml"),
) -> None:
    """Resolve every source of params.yaml to something immutable and write sources.lock.json."""
    from modelweld.config import load_params
    from modelweld.sources import LOCK_NAME, Lock, changes, resolve
    from modelweld.stages.fetch import project_root

    previous = Lock.read_if_present(Path(LOCK_NAME))
    current = resolve(load_params(params), project_root(Path()), previous)
    report = changes(previous, current)
    differs = any(change.what != "same" for change in report)
    if not check:
        current.write(Path(LOCK_NAME))
    emit(
        {"changed": differs, "written": differs and not check, "sources": [asdict(change) for change in report]},
        _table(report, current),
    )
    if check and differs:
        raise typer.Exit(1)


def _table(report: list[Change], lock: Lock) -> Table:
    from rich.markup import escape
    from rich.table import Table

    colours = {"new": "green", "moved": "yellow", "edited": "yellow", "gone": "red", "same": "dim"}
    table = Table(box=None, pad_edge=False)
    for heading in ("source", "", "files", "size", "licence", "pinned to"):
        table.add_column(heading, justify="right" if heading in ("files", "size") else "left", overflow="fold")
    for change in report:
        entry = lock.pinned.get(change.key)
        moved = change.before is not None and change.before != change.after
        address = f"{change.before} → {change.after}" if moved else change.after
        skipped = f" ({len(entry.skipped)} skipped)" if entry and entry.skipped else ""
        table.add_row(
            change.key,
            f"[{colours[change.what]}]{change.what}[/]",
            f"{len(entry.files) if entry else 0}",
            f"{change.size_bytes / 1e6:,.1f} MB",
            escape(change.licence or "—"),
            escape(f"{address or '—'}{skipped}"),
        )
    return table
