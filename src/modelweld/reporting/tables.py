"""The score table, for terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modelweld.reporting.documents import SIGNIFICANT, Scoreboard, document_of, mark, metric_name

REFERENCES = ("expert", "ensemble")
EMPHASIS = {"merged": "bold", "base": "dim", "expert": ""}


def score_table(scoreboard: Scoreboard) -> Table:
    """A rich table of systems × tasks: each score, and what share of the expert's it is; then mean and worst share."""
    document = document_of(scoreboard)
    table = Table(
        title=f"{metric_name(document)} in %, share of the expert's",
        caption=f"▾ ▴ worse or better than the expert beyond chance (exact McNemar, p < {SIGNIFICANT})",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("system", no_wrap=True)
    for task, about in document["tasks"].items():
        table.add_column(f"{task}\n[dim]{about['rows']:,}[/]", justify="right", overflow="fold")
    table.add_column("mean\n[dim]share[/]", justify="right", no_wrap=True)
    table.add_column("worst\n[dim]share[/]", justify="right", no_wrap=True)
    for system in document["order"]:
        row = document["systems"][system]
        cells = []
        for task in document["tasks"]:
            cell = row["tasks"][task]
            text = Text(f"{100 * cell['score']['value']:.1f}")
            text.append(f" {cell['normalised']['value']:.2f}", style="dim")
            text.append(
                mark(cell["versus_expert"]) or " ", style="red" if mark(cell["versus_expert"]) == "▾" else "green"
            )
            cells.append(text)
        table.add_row(
            Text(system),
            *cells,
            Text(f"{row['mean_normalised']:.3f}"),
            Text(f"{row['worst_normalised']:.3f}"),
            style=EMPHASIS.get(system, ""),
        )
    return table


def task_table(document: Mapping[str, Any]) -> Table:
    """A rich table of one task's document (scores/<task>.json): every system with both metrics and their intervals."""
    compared = next((name for name in REFERENCES if name in document["systems"]), None)
    title = f"{document['task']}, {document['rows']:,} rows, in % with {100 * document['confidence']:g} % intervals"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("system", "accuracy", "macro-F1", *((f"share of {compared}", "p") if compared else ())):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system, entry in document["systems"].items():
        cells = [system]
        for metric in ("accuracy", "macro_f1"):
            interval = entry[metric]
            bounds = "" if interval["low"] is None else f"  {100 * interval['low']:.1f}–{100 * interval['high']:.1f}"
            cells.append(f"{100 * interval['value']:.1f}{bounds}")
        if compared:
            cells += [f"{entry['normalised']:.3f}", f"{entry['versus_expert']['p_value']:.2g}"]
        table.add_row(*cells)
    return table


def joint_table(document: Mapping[str, Any]) -> Group:
    """The table of a joint document, and below it each system's accuracy within the classes of every task alone."""
    within = Table(title="accuracy within each task's own classes, in %", box=box.SIMPLE_HEAD, title_justify="left")
    within.add_column("system")
    for task in document["within"]:
        within.add_column(task, justify="right")
    for system in document["systems"]:
        within.add_row(system, *(f"{100 * found[system]:.1f}" for found in document["within"].values()))
    return Group(task_table(document), within)
