"""The score table, for terminals."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modelweld.formats.scores import Interval, Scoreboard, TaskScores
from modelweld.reporting.wording import SIGNIFICANT, mark, metric_name

REFERENCES = ("expert", "ensemble")
EMPHASIS = {"merged": "bold", "base": "dim", "expert": ""}


def score_table(scoreboard: Scoreboard) -> Table:
    """A rich table of systems × tasks: each score, and what share of the expert's it is; then mean and worst share."""
    board = scoreboard.summary()
    table = Table(
        title=f"{metric_name(board.metric)} in %, share of the expert's",
        caption=f"▾ ▴ worse or better than the expert beyond chance (exact McNemar, p < {SIGNIFICANT})",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("system", no_wrap=True)
    for task, about in board.tasks.items():
        table.add_column(f"{task}\n[dim]{about.rows:,}[/]", justify="right", overflow="fold")
    table.add_column("mean\n[dim]share[/]", justify="right", no_wrap=True)
    table.add_column("worst\n[dim]share[/]", justify="right", no_wrap=True)
    for system in board.order:
        row = board.systems[system]
        cells = []
        for cell in row.tasks.values():
            sign = mark(cell.versus_expert)
            text = Text(f"{100 * cell.score.value:.1f}")
            text.append(f" {cell.normalised.value:.2f}", style="dim")
            text.append(sign or " ", style="red" if sign == "▾" else "green")
            cells.append(text)
        table.add_row(
            Text(system),
            *cells,
            Text(f"{row.mean_normalised:.3f}"),
            Text(f"{row.worst_normalised:.3f}"),
            style=EMPHASIS.get(system, ""),
        )
    return table


def task_table(scores: TaskScores) -> Table:
    """A rich table of one task's scores: every system with both metrics and their intervals."""
    compared = next((name for name in REFERENCES if name in scores.systems), None)
    title = f"{scores.task}, {scores.rows:,} rows, in % with {100 * scores.confidence:g} % intervals"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("system", "accuracy", "macro-F1", *((f"share of {compared}", "p") if compared else ())):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system, entry in scores.systems.items():
        cells = [system, *(_in_percent(interval) for interval in (entry.accuracy, entry.macro_f1))]
        if compared:
            cells += [f"{entry.normalised:.3f}", f"{entry.versus_expert.p_value:.2g}"]
        table.add_row(*cells)
    return table


def joint_table(scores: TaskScores, within_tasks: Mapping[str, Mapping[str, float]]) -> Group:
    """The table of joint scores, and below it each system's accuracy within the classes of every task alone."""
    within = Table(title="accuracy within each task's own classes, in %", box=box.SIMPLE_HEAD, title_justify="left")
    within.add_column("system")
    for task in within_tasks:
        within.add_column(task, justify="right")
    for system in scores.systems:
        within.add_row(system, *(f"{100 * found[system]:.1f}" for found in within_tasks.values()))
    return Group(task_table(scores), within)


def _in_percent(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{100 * interval.value:.1f}"
    return f"{100 * interval.value:.1f}  {100 * interval.low:.1f}–{100 * interval.high:.1f}"
