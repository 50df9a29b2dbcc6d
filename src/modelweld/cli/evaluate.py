"""evaluate, report, export: look at a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from modelweld.cli.app import app, emit

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
    text: Annotated[str | None, typer.Option(help="The column with the texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column with the labels.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longer texts are cut, in tokens.")] = None,
    metric: Annotated[
        Literal["accuracy", "macro_f1"] | None, typer.Option(help="What is normalised by the expert's.")
    ] = None,
    expert: Annotated[Path | None, typer.Option(help="The task's expert, to normalise by and to test against.")] = None,
    params: Annotated[Path, typer.Option(help="Where a task's dataset and columns are looked up.")] = Path(
        "params.yaml"
    ),
    base: Base = None,
) -> None:
    """Score one model on one task; what is not said here is taken from params.yaml, where there is one."""
    from modelweld.reporting.tables import task_table
    from modelweld.stages.evaluate import asked, evaluate_model

    said = {"dataset": dataset, "split": split, "text": text, "label": label, "max_length": max_length}
    sample, how = asked(task, params, said, metric)
    document = evaluate_model(model, sample, how, task=task, expert=expert, root=Path(), base=base).to_dict()
    emit(document, task_table(document))


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
