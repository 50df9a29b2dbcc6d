"""Prefect as `modelweld run` needs it: its settings, a server where none is named, the run's lines on a terminal."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from modelweld.flows.server import temporary_server
from modelweld.workspace.processes import TELEMETRY_OFF

SERVER_START_S = 120.0
# Any of these names a server or a profile of the user's own.
NAMED = frozenset({"PREFECT_HOME", "PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"})
LOGGERS = ("prefect.flow_runs", "prefect.task_runs")

LineCallback = Callable[[str], None]


def begin(home: Path, *, quiet: bool, on_server: Callable[[], None]) -> Callable[[], None]:
    """Set Prefect up as the user did, else with its home in `home` and a server of this process.

    Call it before Prefect is imported, which reads its settings then. `on_server` is called when such a server is
    started; what is returned waits until it answers. `quiet` keeps Prefect's and MLflow's own logs off the terminal.
    """
    settings = dict(TELEMETRY_OFF)
    if quiet:
        settings |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    named = bool(os.environ.keys() & NAMED)
    if not named:
        settings["PREFECT_HOME"] = str(home)
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    if named:
        return lambda: None
    on_server()
    # Closed at the very end: Prefect sends its last events while the interpreter shuts down, and registers that later.
    lasting = ExitStack()
    atexit.register(lasting.close)
    return lasting.enter_context(temporary_server(home, SERVER_START_S))


def is_own_server(home: Path) -> bool:
    """Whether this process runs its own Prefect server with its home in `home`."""
    # By the end of a run PREFECT_API_URL is set in either case: the home tells.
    return os.environ.get("PREFECT_HOME") == str(home)


def show_progress(on_message: LineCallback, on_stage_line: LineCallback | None) -> None:
    """Hand the log records that a flow marks for the terminal to `on_message`, the stages' own to `on_stage_line`."""
    handler = _Terminal(on_message, on_stage_line)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)


class _Terminal(logging.Handler):
    def __init__(self, on_message: LineCallback, on_stage_line: LineCallback | None) -> None:
        super().__init__(logging.INFO)
        self._on_message = on_message
        self._on_stage_line = on_stage_line

    def emit(self, record: logging.LogRecord) -> None:
        facts: Mapping[str, Any] | None = getattr(record, "modelweld", None)
        if facts is None:
            return
        if facts.get("line"):
            if self._on_stage_line:
                self._on_stage_line(record.getMessage())
            return
        seconds = f" in {facts['seconds']:.1f} s" if "seconds" in facts else ""
        self._on_message(f"{record.getMessage()}{seconds}")
