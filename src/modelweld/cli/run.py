"""run and rederive: the whole pipeline as one Prefect flow run, and a recorded merge made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelweld import settings
from modelweld.cli.app import app, emit, stderr
from modelweld.cli.app import options as root_options

if TYPE_CHECKING:
    from rich.table import Table

    from modelweld.workspace import Project


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

    project = Project.find(settings.project_root(Path.cwd()))
    # Refused before Prefect's server is started, which takes seconds.
    project.head()
    if not allow_dirty:
        project.require_clean()
    done = (None if project.changed_files() else _unchanged(project, frozen)) or _flow(
        project,
        quiet=quiet,
        frozen=frozen,
        allow_dirty=allow_dirty,
        to_registry=register,
        stage_timeout_s=stage_timeout,
    )
    emit(done, _text(done, project))


def _unchanged(project: Project, frozen: bool) -> dict[str, Any] | None:
    """What the flow would answer where it has nothing to do; None where it may have."""
    from modelweld.flows.summary import outcome
    from modelweld.flows.unchanged import unchanged_since

    known = unchanged_since(project, frozen=frozen)
    return None if known is None else outcome(known, [], [], None)


def _flow(project: Project, *, quiet: bool, **options: Any) -> dict[str, Any]:
    from modelweld.flows import session

    def on_server() -> None:
        stderr.print("no Prefect server is named (PREFECT_API_URL): one starts for this run", style="dim")

    ready = session.begin(_prefect_home(project), quiet=not root_options.debug, on_server=on_server)
    from modelweld.flows.merge import merge

    session.show_progress(lambda line: stderr.print(line, markup=False, highlight=False), None if quiet else _show_line)
    ready()
    done: dict[str, Any] = merge(project=str(project.root), **options)
    return done


def _prefect_home(project: Project) -> Path:
    return project.state_dir / "prefect"


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

    project = Project.find(settings.project_root(Path.cwd()))
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
    from modelweld.flows.session import is_own_server

    state = project.state_dir
    home = _prefect_home(project)
    server = f"PREFECT_HOME={home} " if is_own_server(home) else ""
    registry = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{project.root / 'mlflow.db'}")
    docs = state / "data-docs" / "index.html"
    return [
        "to see more:",
        f"  mlflow ui --backend-store-uri {registry}",
        f"  {server}prefect server start",
        *([f"  python -m webbrowser {docs.as_uri()}"] if docs.is_file() else []),
    ]


def _scores(rows: list[dict[str, Any]]) -> Table:
    """The scores as a table: one line per system, one column per task, what was registered in bold."""
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
