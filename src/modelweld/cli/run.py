"""run and rederive: the whole pipeline as one Prefect flow run, and a recorded merge made again."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelweld.cli.app import app, emit, options, stderr

if TYPE_CHECKING:
    from rich.table import Table

    from modelweld.workspace import Project

SERVER_START_S = 120.0


@app.command()
def run(
    frozen: Annotated[bool, typer.Option("--frozen", help="Take sources.lock.json as it is: resolve nothing.")] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Run uncommitted changes; the record says so.")
    ] = False,
    register: Annotated[bool, typer.Option(help="Register the result in MLflow.")] = True,
    stage_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long a stage may take.")] = 12 * 3600,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not show the stages' own lines.")] = False,
) -> None:
    """Fetch, validate, merge, evaluate and register, in a git worktree of its own; nothing when nothing changed."""
    from modelweld.workspace import Project

    project = Project.find(Path(os.environ.get("MODELWELD_PROJECT_ROOT") or Path.cwd()))
    # Refused before Prefect's server is started, which takes seconds.
    project.head()
    if not allow_dirty:
        project.require_clean()
    ready = _prefect(project)
    from modelweld.flows.merge import merge

    _show_progress(stage_lines=not quiet)
    ready()
    done = merge(
        project=str(project.root),
        frozen=frozen,
        allow_dirty=allow_dirty,
        to_registry=register,
        stage_timeout_s=stage_timeout,
    )
    emit(done, _text(done, project))


@app.command()
def rederive(
    tag: Annotated[
        str | None, typer.Argument(help="A record's tag, merge-run/<name>/<run-id>; default: the newest.")
    ] = None,
    output: Annotated[str, typer.Option(help="Which output of the record.")] = "merged",
) -> None:
    """Make a recorded merge again from its recorded inputs; exits 1 when a byte differs."""
    from dataclasses import asdict

    from modelweld.errors import GateRefused, WorkspaceError
    from modelweld.workspace import Project
    from modelweld.workspace.rederiving import rederive as make_again

    project = Project.find(Path(os.environ.get("MODELWELD_PROJECT_ROOT") or Path.cwd()))
    record = project.record(tag) if tag else project.latest_record()
    if record is None:
        raise WorkspaceError("nothing is recorded here yet", where=str(project.root), hint="modelweld run")
    found = make_again(project, record, output, on_line=_show_line)
    if not found.equal:
        raise GateRefused(
            f"{found.output} was recorded as {found.recorded} and comes out as {found.rebuilt}",
            where=found.record,
            hint="another processor, device or package version may round otherwise: manifest.json names those of then",
        )
    emit(asdict(found) | {"equal": True}, f"{found.output} of {found.record}: rebuilt byte for byte ({found.rebuilt})")


def _show_line(line: str) -> None:
    stderr.print(f"  │ {line}", style="dim", markup=False, highlight=False)


def _prefect(project: Project) -> Callable[[], None]:
    """Set Prefect up as the user did, else with a home in the project and a server of this process; waits for that."""
    from modelweld.flows.server import temporary_server
    from modelweld.workspace.processes import TELEMETRY_OFF

    settings = dict(TELEMETRY_OFF)
    if not options.debug:
        # What Prefect and MLflow say goes to their own databases; the terminal shows the run.
        settings |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    theirs = os.environ.keys() & {"PREFECT_HOME", "PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}
    if not theirs:
        settings["PREFECT_HOME"] = str(project.state_dir / "prefect")
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    if theirs:
        return lambda: None
    stderr.print("no Prefect server is named (PREFECT_API_URL): one starts for this run", style="dim")
    # Left at the very end: Prefect sends its last events while the interpreter shuts down, and registers that later.
    lasting = ExitStack()
    atexit.register(lasting.close)
    return lasting.enter_context(temporary_server(Path(settings["PREFECT_HOME"]), SERVER_START_S))


class _Terminal(logging.Handler):
    """Shows the log records that a flow marked for the terminal."""

    def __init__(self, stage_lines: bool) -> None:
        super().__init__(logging.INFO)
        self.stage_lines = stage_lines

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] | None = getattr(record, "modelweld", None)
        if facts is None or (facts.get("line") and not self.stage_lines):
            return
        if facts.get("line"):
            _show_line(record.getMessage())
            return
        seconds = f" in {facts['seconds']:.1f} s" if "seconds" in facts else ""
        stderr.print(f"{record.getMessage()}{seconds}", markup=False, highlight=False)


def _show_progress(stage_lines: bool) -> None:
    handler = _Terminal(stage_lines)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(handler)


def _text(done: dict[str, Any], project: Project) -> Any:
    from rich.console import Group
    from rich.markup import escape

    tag = done["record"]["tag"]
    if done["status"] == "unchanged":
        return f"nothing changed since {tag}: no stage was run"
    registered = done["registered"]
    if registered:
        aliases = ", ".join(name for name, number in registered["aliases"].items() if number == registered["version"])
        last = f"registered: {registered['uri']} ({aliases or 'no alias'})"
    else:
        last = f"not registered: `modelweld register {tag}` does"
    notes = [escape(f"note: {note}") for note in done["notes"]]
    return Group(_scores(done["scores"]), *notes, f"record: {tag}", last, *_more(project))


def _more(project: Project) -> list[str]:
    """Where a person would look next, as commands that can be pasted."""
    state = project.state_dir
    # By now PREFECT_API_URL is set even where the server is this run's own: its home tells.
    home = str(state / "prefect")
    server = f"PREFECT_HOME={home} " if os.environ.get("PREFECT_HOME") == home else ""
    registry = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{project.root / 'mlflow.db'}")
    docs = state / "data-docs" / "index.html"
    return [
        "to see more:",
        f"  mlflow ui --backend-store-uri {registry}",
        f"  {server}prefect server start",
        *([f"  python -m webbrowser {docs.as_uri()}"] if docs.is_file() else []),
    ]


def _scores(rows: list[dict[str, Any]]) -> Table:
    """The scores as a table: a line a system, a column a task, what was registered in bold."""
    from statistics import fmean

    from rich.table import Table

    metric = next((key for row in rows for key in ("accuracy", "macro_f1") if key in row), "score")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(title=f"{metric}, and the mean share of the experts'", title_justify="left", box=None)
    table.add_column("system", no_wrap=True)
    for heading in (*tasks, "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    shares = {
        system: [row["of expert"] for row in rows if row["system"] == system and row["of expert"] is not None]
        for system in dict.fromkeys(row["system"] for row in rows)
    }
    for system in sorted(shares, key=lambda name: fmean(shares[name] or [0.0])):
        by_task = {row["task"]: row for row in rows if row["system"] == system}
        cells = [_cell(by_task.get(task), metric) for task in tasks]
        mean = f"{fmean(shares[system]):.3f}" if shares[system] else "–"
        table.add_row(system, *cells, mean, style="bold" if system == "merged" else "")
    return table


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    return "–" if row is None else f"{row[metric]:.3f}"
