"""evaluate, report, export: look at a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modelweld.cli.app import app, emit
from modelweld.errors import ConfigError
from modelweld.kinds import ROLES, KindName, MetricName

Base = Annotated[
    Path | None,
    typer.Option(help="What an adapter is folded into; models/base of the project by default, else what it names."),
]


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A merged directory, or any Hugging Face model directory.")],
    task: Annotated[str | None, typer.Option(help="Whose head: a task of the merged directory.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A folder of <split>.parquet|csv|jsonl, such a file, or hf://org/name@revision."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split to score.")] = None,
    kind: Annotated[KindName | None, typer.Option(help="The kind of task.")] = None,
    text: Annotated[str | None, typer.Option(help="The column with the texts.")] = None,
    image: Annotated[
        str | None, typer.Option(help="The column with the images; says that images are classified.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column with the labels.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help=f"A column by its role: {', '.join(ROLES)}. Repeatable."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longer texts are cut, in tokens.")] = None,
    metric: Annotated[MetricName | None, typer.Option(help="What is normalised by the expert's.")] = None,
    expert: Annotated[Path | None, typer.Option(help="The task's expert, to normalise by and to test against.")] = None,
    params: Annotated[Path, typer.Option(help="Where a task's dataset and columns are looked up.")] = Path(
        "params.yaml"
    ),
    base: Base = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Image tasks: score all heads together, over the classes of all of them.")
    ] = False,
) -> None:
    """Score one model on one task; options that are left out are taken from params.yaml, where there is one."""
    from modelweld.reporting.tables import joint_table, task_table
    from modelweld.stages.evaluate import evaluate_model, resolve_request

    columns = _columns(column or [], {"text": text, "image": image, "label": label})
    if joint:
        named = {"--task": task, "--dataset": dataset, "--kind": kind, "--text": text, "--expert": expert}
        _none_of(named, "--joint takes all heads, their datasets and experts from params.yaml")
        from modelweld.evaluation.joint_label_space import evaluate_joint

        both = evaluate_joint(model, params, split, columns, metric)
        emit(both.data(), joint_table(both.scores, both.within))
        return
    changes = {"dataset": dataset, "split": split, "kind": kind, "max_length": max_length}
    spec, settings = resolve_request(task, params, changes, columns, metric)
    scores = evaluate_model(model, spec, settings, task=task, expert=expert, root=Path(), base=base)
    emit(scores.data(), task_table(scores))


def _columns(pairs: list[str], options: dict[str, str | None]) -> dict[str, str]:
    """Columns by role, from `--column ROLE=NAME` and the options that are named as a role."""
    columns = {role: name for role, name in options.items() if name is not None}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not equals or not name or role not in ROLES:
            raise ConfigError(f"{pair!r} is not ROLE=NAME", where="--column", hint=f"roles are {', '.join(ROLES)}")
        if columns.setdefault(role, name) != name:
            raise ConfigError(f"two columns of role {role}: {columns[role]}, {name}", where="--column", hint="name one")
    return columns


def _none_of(options: dict[str, Any], why: str) -> None:
    """Refuse options that contradict another one."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(why, where=", ".join(given), hint="leave them out")


@app.command()
def report(
    root: Annotated[Path, typer.Option(help="The project that was run.")] = Path(),
    out: Annotated[Path | None, typer.Option(help="Where to; .modelweld/report/ in the project by default.")] = None,
    name: Annotated[str | None, typer.Option(help="The page's title; `name:` of params.yaml by default.")] = None,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Also score the plane through two experts and the merge: takes a while.")
    ] = False,
    steps: Annotated[int, typer.Option(min=3, help="Points along each side of that plane.")] = 9,
) -> None:
    """One HTML page, with plots, about the merge in this project: scores, behaviour, alignment, lineage, recipe."""
    from modelweld.stages.report import report as build

    document = build(root, out, name, steps=steps if landscape else None)
    emit(document, f"report: {document['report']}")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    task: Annotated[str | None, typer.Option(help="Whose head; not needed for a model with one head.")] = None,
    model: Annotated[Path, typer.Option(help="The merged directory.")] = Path("merged"),
    base: Base = None,
) -> None:
    """A plain Hugging Face directory of one task, which needs no modelweld."""
    from modelweld.checkpoints.folding import base_for
    from modelweld.checkpoints.loading import export as write

    written = write(model, task, out, base=base_for(model, base, Path()))
    emit({"model": str(model), "task": task, "out": str(written)}, f"exported: {written}")
