"""Progress of an evaluation on standard error, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Where nobody watches a bar, as in the log of a run, a line at most this often.
LINE_EVERY_S = 30.0


@contextmanager
def evaluation_progress(task: str, rows: int) -> Iterator[Callable[[int], None]]:
    """One bar over the rows of all systems, or lines where standard error is no terminal.

    The function it yields adds the rows that are done.
    """
    from transformers.utils import logging

    console = Console(stderr=True)
    shown = logging.is_progress_bar_enabled()
    # transformers shows a bar of its own for each model it loads, which would garble this one.
    logging.disable_progress_bar()
    try:
        if not console.is_terminal:
            yield progress_lines(f"evaluate {task}", rows, lambda line: console.print(line, highlight=False))
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"evaluate {task}", total=rows)
            yield lambda done: progress.advance(bar, done)
    finally:
        if shown:
            logging.enable_progress_bar()


def progress_lines(
    what: str, total: int, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[int], None]:
    """A function that adds what is done, and writes a line with the time left no more often than LINE_EVERY_S."""
    started = last = clock()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = clock()
        if now - last >= LINE_EVERY_S and done < total:
            left = (now - started) * (total - done) / done
            write(f"{what}: {done} of {total} rows, about {left / 60:.0f} min left")
            last = now

    return advance
