"""init, doctor, schema: begin a project, look it over, describe its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from modelweld.cli.app import app, emit, stdout

DocumentName = Literal["lock", "gate", "scores", "manifest", "alignment", "record", "ledger-event", "address"]
Folder = Annotated[Path, typer.Argument(help="The project's folder.")]


@app.command()
def init(root: Folder = Path()) -> None:
    """Begin a project here: git, DVC with a local remote, dvc.yaml and a params.yaml to edit."""
    from modelweld.workspace.initialise import initialise

    done = initialise(root)
    lines = [f"  {state:<8} {part}" for part, state in done.items()]
    following = "next: edit params.yaml, commit, then `modelweld doctor` and `modelweld run`"
    emit(done, "\n".join([*lines, following]))


@app.command()
def doctor(root: Folder = Path()) -> None:
    """Look the machine and the project over; exits 1 when something stands in the way of a run."""
    from rich.table import Table

    from modelweld.workspace.doctor import diagnose

    findings = diagnose(root)
    table = Table("check", "state", "saw", "hint", box=None)
    for finding in findings:
        colour = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.state]
        table.add_row(finding.check, f"[{colour}]{finding.state}[/]", finding.saw, finding.hint)
    emit([dataclasses.asdict(finding) for finding in findings], table)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema(
    kind: Annotated[Literal["params", "recipe"], typer.Argument(help="Which file's schema.")] = "params",
    document: Annotated[
        DocumentName | None, typer.Option(help="Instead: the schema of a document that modelweld writes.")
    ] = None,
) -> None:
    """Print the JSON Schema of params.yaml, of a recipe file or of a document, for editors and checks."""
    if document is None:
        from modelweld.config import json_schema

        found = json_schema(kind)
    else:
        from modelweld.formats import json_schema as document_schema

        found = document_schema(document)
    stdout.print_json(json.dumps(found))
