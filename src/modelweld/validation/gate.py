"""Refusing a run by its gate, with a table of what failed."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from modelweld.errors import GateRefused
from modelweld.formats.gate import Gate, Result

SHOWN = 25


def refuse(gate: Gate, path: Path) -> None:
    """Raise GateRefused, with a table of what failed, unless the verdict is `pass`; `path` is the gate file's."""
    failed = gate.refusals
    if failed:
        raise GateRefused(
            f"validation refused this run, {len(failed)} critical "
            f"{'expectation' if len(failed) == 1 else 'expectations'} failed\n{_grid(failed)}",
            where=str(path),
            hint="as the table says, then run the same command again; nothing was computed yet",
        )


def _grid(results: tuple[Result, ...]) -> str:
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("subject", "expectation", "where", "observed", "hint"):
        grid.add_column(heading, overflow="fold")
    for result in results[:SHOWN]:
        observed = json.dumps(result.observed, ensure_ascii=False)
        grid.add_row(result.subject, result.expectation, result.where, observed, result.hint)
    # Markup off: a test row may well hold square brackets.
    sink = Console(file=io.StringIO(), width=160, markup=False, highlight=False, color_system=None)
    sink.print(grid)
    text: str = sink.file.getvalue().rstrip()  # type: ignore[attr-defined]
    more = len(results) - SHOWN
    return f"{text}\n… and {more} more in the gate file" if more > 0 else text
