"""merge and plan: the engine without any pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelweld.cli.app import app, emit, options, stderr
from modelweld.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

    from modelweld.engine import Progress
    from modelweld.stages.merge import MergeReport
    from modelweld.stages.plan import PlanEstimate

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:i] or mps; cuda:0,cuda:1: a process for each.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Default: the cores this process may use.")]
MemoryLimit = Annotated[
    float | None, typer.Option("--memory-limit", min=0.01, help="GB that tensors in work may take.")
]


Executor = Annotated[str, typer.Option("--executor", help="local, or ray[:ADDRESS]: one Ray task per output shard.")]


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    out: Annotated[Path, typer.Argument(help="The directory that appears when all is done.")],
    device: Device = "auto",
    executor: Executor = "local",
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="drop_rate=0.5,0.8: one candidate each, in OUT/<key>/. Repeatable."),
    ] = None,
) -> None:
    """Weld the models of a recipe into OUT. Interrupted, the same command goes on where it was."""
    from modelweld.config import load_recipe
    from modelweld.stages.merge import merge as weld

    limit = int(memory_limit * 1e9) if memory_limit else None
    how: dict[str, Any] = {"executor": executor, "threads": threads, "memory_limit": limit}
    if grid:
        from modelweld.stages.grid import merge_grid

        axes = dict(_axis(axis) for axis in grid)
        with _watched() as progress:
            reports = merge_grid(load_recipe(recipe), axes, out, device, progress=progress, **how)
        documents = {key: report.data() for key, report in reports.items()}
        emit(documents, "\n".join(_summary(report) for report in reports.values()))
        return
    with _watched() as progress:
        report = weld(load_recipe(recipe), out, device, progress=progress, **how)
    emit(report.data(), _summary(report))


@app.command()
def plan(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or a params.yaml: its models need not be fetched yet.")
    ],
    device: Device = "auto",
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    out: Annotated[Path, typer.Option("--out", help="Where the merge would go: its disk is looked at.")] = Path(
        "merged"
    ),
) -> None:
    """Say what a merge would do, tensor by tensor, what it would take, and refuse what cannot fit."""
    from modelweld.stages.plan import plan as estimate_plan

    limit = int(memory_limit * 1e9) if memory_limit else None
    estimate = estimate_plan(recipe, out, device, threads=threads, memory_limit=limit)
    emit(estimate.data(), None if options.json else _plan_tables(estimate))
    estimate.require_fit()


def _axis(text: str) -> tuple[str, list[Any]]:
    """`drop_rate=0.5,0.8` as a name and its values, each read as YAML."""
    from modelweld.config.reading import read_yaml

    name, equals, values = text.partition("=")
    try:
        found = [read_yaml(value) for value in values.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not readable: {error}", where="--grid") from error
    if not equals or not name.strip() or any(isinstance(value, list | dict) for value in found):
        raise ConfigError(f"{text!r} names no values", where="--grid", hint="--grid drop_rate=0.5,0.8")
    return name.strip(), found


@contextmanager
def _watched() -> Iterator[Progress | None]:
    """A progress bar on standard error: bytes, tensors, rate, time left. None under --json."""
    if options.json or not stderr.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tensors]}/{task.fields[of]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield _Bar(progress)


class _Bar:
    """A Progress that moves a rich progress bar."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("merging", total=None, tensors=0, of="?")
        self._tensors = 0

    def begin(self, size_bytes: int, tensors: int) -> None:
        """The plan is made: so much is to be read."""
        self._progress.update(self._task, total=size_bytes, of=tensors)

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""
        self._progress.advance(self._task, size_bytes)

    def finished(self, tensor: str) -> None:
        """A tensor is written."""
        self._tensors += 1
        self._progress.update(self._task, tensors=self._tensors)


def _summary(report: MergeReport) -> str:
    from rich.markup import escape

    total = sum(report.seconds.values())
    moved = report.read_bytes + report.write_bytes
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    lines = [
        f"[bold]{escape(str(report.out))}[/]: {report.merged} tensors merged by {report.method}, {report.copied} copied"
        + (f", {report.resumed} taken over from an interrupted run" if report.resumed else "")
        + (f"; heads: {', '.join(report.heads)}" if report.heads else ""),
        f"  {total:.1f} s ({phases}); {moved / 1e9:.2f} GB moved, {moved / 1e9 / max(total, 1e-9):.2f} GB/s; "
        f"peak memory {report.peak_memory_bytes / 1e6:.0f} MB",
    ]
    if report.delta_survival:
        survival = report.delta_survival
        lines.append(
            f"  after rounding {survival['whole_model']:.1%} of the delta is left "
            f"(worst tensor {survival['worst_tensor']:.1%})"
        )
    # Names come out of other people's files: nothing in them is markup.
    lines += [escape(f"  left out: {name} ({why})") for name, why in list(report.left_out.items())[:5]]
    if len(report.left_out) > 5:
        lines.append(f"  … and {len(report.left_out) - 5} more, in manifest.json")
    lines += [escape(f"  note: {note}") for note in report.notes]
    lines.append(f"  manifest {report.manifest_digest[:16]}, model {report.model_digest[:16]}")
    return "\n".join(lines)


def _plan_tables(estimate: PlanEstimate) -> Group:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    tensors = Table(
        "tensors", "method", "role", "dtype", "read", "write", "GFLOP", "why", title="what each tensor gets"
    )
    for row in estimate.groups():
        tensors.add_row(*row)
    needs = Table("", "needed", "there is", title="what it takes")
    for row in estimate.needs():
        needs.add_row(*row)
    return Group(tensors, needs, *(escape(line) for line in estimate.remarks()))


@app.command("import-mergekit")
def import_mergekit(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where the recipe goes; default: printed.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Write it even where it does not mean the same.")] = False,
) -> None:
    """Turn a mergekit configuration into a recipe, and name what cannot be carried over."""
    import yaml

    from modelweld.config.loading import check_recipe
    from modelweld.config.mergekit import convert
    from modelweld.config.reading import read_yaml

    try:
        document = read_yaml(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"is not readable YAML: {error}", where=str(config)) from error
    imported = convert(document)
    check_recipe(imported.recipe, where=f"the recipe that {config} gives")
    if imported.lost and not partial:
        raise ConfigError(
            "does not mean the same as a recipe: " + "; ".join(imported.lost),
            where=str(config),
            hint="change these, or take the recipe without them: --partial",
        )
    remarks = [f"not carried over: {item}" for item in imported.lost] + [f"note: {note}" for note in imported.notes]
    text = "".join(f"# {line}\n" for line in remarks) + yaml.safe_dump(imported.recipe, sort_keys=False)
    if out is not None:
        if out.exists():
            raise ConfigError("exists already", where=str(out), hint="name another file")
        out.write_text(text, encoding="utf-8")
    document = {"recipe": imported.recipe, "lost": imported.lost, "notes": imported.notes, "out": out and str(out)}
    if options.json or out is not None:
        emit(document, "\n".join([str(out), *remarks]))
    else:
        typer.echo(text, nl=False)
