"""register, promote, rollback, audit: the model registry and its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelweld import settings
from modelweld.cli.app import app, emit, stderr

if TYPE_CHECKING:
    from modelweld.registry.promotion import Registry, Transition

Name = Annotated[str | None, typer.Option("--name", help="The registered model; default: params.yaml's name.")]
Push = Annotated[str | None, typer.Option("--push", metavar="REMOTE", help="Push the ledger's branch there after.")]


@app.command()
def register(
    tag: Annotated[
        str | None,
        typer.Argument(help="A record's tag, merge-run/<name>/<run-id>; default: the newest without a version."),
    ] = None,
) -> None:
    """Register a recorded run in MLflow, or finish a registration that failed; exits 1 when the gate refuses it."""
    from modelweld.registry.from_record import latest_unregistered, register_record
    from modelweld.registry.promotion import current_actor
    from modelweld.workspace import Project

    project = Project.find(_root())
    chosen = tag or latest_unregistered(project.root)
    if chosen is None:
        emit({"registered": None}, "every record has a version: nothing to do")
        return
    record = project.record(chosen)
    if "push" in project.missing_steps(record):
        # A version whose weights only this machine has would be a dangling pointer everywhere else.
        project.push(record)
        project.mark_done(record, "push")
    outcome = register_record(project.root, record.tag, at=datetime.now(UTC), actor=current_actor(project.root))
    project.mark_done(record, "register")
    done = outcome.registered
    made = "registered as" if done.created else "was registered already as"
    emit(
        outcome.data(),
        f"{done.record} {made} {done.uri}\ngate: {outcome.decision.verdict}\n{outcome.decision.explain()}\n"
        f"{_standing(outcome.aliases)}",
    )
    if not outcome.decision.passed:
        stderr.print(f"version {done.version} is registered without an alias: the gate refused it", style="yellow")
        raise typer.Exit(1)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version's number, or an alias such as challenger.")],
    to: Annotated[str, typer.Option("--to", help="champion or challenger.")] = "champion",
    override: Annotated[
        str | None,
        typer.Option("--override", metavar="REASON", help="Promote although the gate says no; kept for ever."),
    ] = None,
    name: Name = None,
    push: Push = None,
) -> None:
    """Make a version champion and the champion so far previous; exits 1 when its gate did not pass."""
    from modelweld.registry.promotion import current_actor
    from modelweld.registry.promotion import promote as move

    registry = _registry(name)
    done = move(registry, version, at=datetime.now(UTC), actor=current_actor(registry.root), to=to, override=override)
    _report(registry, done, f"{done.name} version {done.version} is {to.lower()}", push)


@app.command()
def rollback(
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept in the ledger.")] = None,
    name: Name = None,
    push: Push = None,
) -> None:
    """Make the previous champion champion again, after its weights were brought here and checked."""
    from modelweld.registry.promotion import current_actor
    from modelweld.registry.promotion import rollback as move

    registry = _registry(name)
    done = move(registry, at=datetime.now(UTC), actor=current_actor(registry.root), reason=reason)
    _report(registry, done, f"{done.name} is back at version {done.version}", push)


@app.command()
def audit(
    version: Annotated[str, typer.Argument(help="A version's number, or an alias such as champion.")],
    name: Name = None,
    weights: Annotated[bool, typer.Option("--weights", help="Bring the weights here and check them as well.")] = False,
) -> None:
    """Where a version came from and what happened to it; exits 1 when git, DVC, MLflow and the ledger disagree."""
    from modelweld.registry.audit import audit as look

    registry = _registry(name)
    found = look(registry, version, weights=weights)
    emit(found.document, _lineage(found.document))
    if not found.consistent:
        stderr.print("the records disagree: see the checks above", style="bold red")
        raise typer.Exit(1)


def _root() -> Path:
    return settings.project_root(Path.cwd())


def _registry(name: str | None) -> Registry:
    from modelweld.registry.promotion import open_registry
    from modelweld.workspace import Project

    project = Project.find(_root())
    return open_registry(project.root, name or project.name)


def _report(registry: Registry, done: Transition, said: str, push: str | None) -> None:
    if push and done.event is not None:
        registry.ledger.push(push)
    unchanged = " already: nothing was moved" if done.event is None else ""
    emit(done.data(), f"{said}{unchanged}\n{_standing(done.after)}")


def _standing(aliases: Mapping[str, int]) -> str:
    return "aliases: " + (", ".join(f"{alias} → {number}" for alias, number in aliases.items()) or "none")


def _lineage(document: Mapping[str, Any]) -> Any:
    from rich.console import Group

    keys = (
        "uri",
        "aliases",
        "record",
        "commit",
        "source_commit",
        "weights",
        "md5",
        "manifest_sha256",
        "method",
        "gate",
    )
    facts = [(key, ", ".join(value) if isinstance(value := document.get(key), list) else value) for key in keys]
    columns = ("name", "source", "revision", "licence", "sha256")
    parents = [[parent.get(column) for column in columns] for parent in document["parents"]]
    scores = [(task, value if value is None else f"{value:.4f}") for task, value in document["normalised"].items()]
    events = [
        (event["at"], event["event"], event["actor"], event.get("override") or event.get("reason"))
        for event in document["ledger"]
    ]
    checks = [("ok" if check["ok"] else "NO", check["check"], check["saw"]) for check in document["checks"]]
    return Group(
        _table(f"{document['name']} version {document['version']}", (), facts),
        _table("made from", columns, parents),
        _table("scores", ("task", "of its expert"), scores),
        _table("ledger", ("at", "event", "by", "why"), events),
        _table("checks", (), checks),
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, title=f"\n{title}", title_justify="left", show_header=bool(columns))
    for number in range(len(columns) or max((len(row) for row in rows), default=0)):
        # Digests are for copying: never cut short.
        table.add_column(columns[number] if columns else "", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell in (None, "") else str(cell)) for cell in row))
    return table
