"""How far each expert is: bars with the time that is left on a terminal, lines in a log file."""

from __future__ import annotations

import queue
import time
from types import TracebackType
from typing import Any

from recipe import duration
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 0.1  # of all work, where there is no terminal to draw bars on


class Experts:
    """The progress of several experts from the queue that their processes report to."""

    def __init__(self, console: Console, reports: Any, work: dict[str, float]) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._console, self._reports, self._work = console, reports, work
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bars.add_task("all experts", total=sum(work.values()))
        self._each = {task: self._bars.add_task(task, total=total) for task, total in work.items()}
        self._began = time.monotonic()
        self._line_at = LINE_EVERY

    def __enter__(self) -> Experts:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def read(self) -> None:
        """Take in what was reported since the last call."""
        while True:
            try:
                task, work = self._reports.get_nowait()
            except queue.Empty:
                break
            self._advance(task, work)
        if not self._console.is_terminal:
            self._print_line()

    def finished(self, task: str, line: str) -> None:
        """Show that an expert is complete."""
        # Texts are shorter than was assumed, or longer.
        self._advance(task, self._work[task] - self._bars.tasks[self._each[task]].completed)
        self._bars.update(self._each[task], visible=False)
        self._console.print(f"  {line}", highlight=False, soft_wrap=True)

    def _advance(self, task: str, work: float) -> None:
        # Texts that are longer than was assumed must not make it more than all.
        each = self._bars.tasks[self._each[task]]
        work = min(work, self._work[task] - each.completed)
        self._bars.advance(each.id, work)
        self._bars.advance(self._all, work)

    def _print_line(self) -> None:
        done = self._bars.tasks[0].completed / sum(self._work.values())
        if done >= self._line_at:
            left = (time.monotonic() - self._began) * (1 - done) / done
            self._console.print(
                f"  {done:.0%} of all experts, about {duration(max(left, 0))} left", highlight=False, soft_wrap=True
            )
            self._line_at = done + LINE_EVERY
