"""The merge stage: a recipe and its models in, a merged directory out, complete or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from modelweld import settings
from modelweld.config import Recipe, load_params, load_recipe
from modelweld.engine import (
    Execution,
    Plan,
    Progress,
    build,
    execute,
    open_inputs,
    place,
    publish,
    require_replaceable,
    staged,
)
from modelweld.engine.cost.memory import peak_resident
from modelweld.errors import ConfigError
from modelweld.lineage import manifest, model_card

LOCK = "sources.lock.json"
STAGING = Path(".modelweld") / "staging"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Clocks and memory stand here and never in the manifest."""

    out: Path
    manifest_digest: str
    model_digest: str
    method: str
    merged: int
    copied: int
    resumed: int
    heads: tuple[str, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    delta_survival: Mapping[str, float] | None
    read_bytes: int
    write_bytes: int
    seconds: Mapping[str, float]
    peak_memory_bytes: int

    def document(self) -> dict[str, Any]:
        """For machines: JSON-able."""
        return {**self.__dict__, "out": str(self.out), "left_out": dict(self.left_out), "seconds": dict(self.seconds)}


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    device: str = "auto",
    *,
    executor: str = "local",
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    staging: Path | None = None,
    card: bool = True,
    sha256: bool = False,
    root: Path | None = None,
) -> MergeReport:
    """Weld a recipe's experts into the directory `out`, which appears at once and complete.

    Interrupted, the same call goes on where it was. An `out` that an earlier merge wrote is replaced; one with anything
    else in it is refused. Several devices (`cuda:0,cuda:1`) have one process each, a Ray cluster (`executor="ray:…"`)
    one task per shard; `threads` and `memory_limit` are for all processes of this machine together, or for each task.

    `sources` are pinned entries of sources.lock.json by model, for the manifest. A recipe with `align:` has its experts
    brought to one order first; symmetries are cached below `root`, by default this folder.

        report = merge("recipe.yaml", "merged")
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    out = Path(out)
    require_replaceable(out)
    placement = place(device, executor)
    started = time.perf_counter()
    with open_inputs(recipe) as inputs:
        plan = build(recipe, inputs)
        planned = time.perf_counter()
        alignment = None
        if recipe.alignment is not None:
            # Here, because it brings along solvers and the evaluation, which other merges need not wait for.
            from modelweld.alignment import align_inputs, with_recomputed_statistics

            alignment = align_inputs(recipe, plan, inputs, root or Path())
            inputs, plan = alignment.inputs, replace(plan, notes=(*plan.notes, *alignment.notes))
        matched = time.perf_counter()
        # An interrupted merge goes on only where units were matched to the same ones.
        key = plan.key if alignment is None else blake3((plan.key + alignment.digest()).encode()).hexdigest()
        with staged(out, key, staging) as directory:
            execution = execute(
                plan,
                inputs,
                directory,
                placement=placement,
                threads=threads,
                memory_limit=memory_limit,
                progress=progress,
            )
            executed = time.perf_counter()
            tree = directory / "tree"
            repair = None
            if alignment is not None:
                alignment.write(tree)
                execution, repair = with_recomputed_statistics(recipe, plan, inputs, tree, execution)
            document = manifest.build(
                recipe,
                plan,
                inputs,
                execution,
                tree,
                device=placement.kind,
                sources=sources,
                sha256=sha256,
                alignment=alignment.manifest_entry() if alignment is not None else None,
                repair=repair,
            )
            manifest.write(document, tree)
            if card:
                (tree / "README.md").write_text(model_card.render(document), encoding="utf-8")
            publish(directory, out)
    took = {"align": matched - planned} if alignment is not None else {}
    seconds = {"plan": planned - started, **took, **execution.seconds, "manifest": time.perf_counter() - executed}
    return report_of(out, recipe, plan, execution, document, seconds)


def merge_pipeline(params_file: Path, root: Path) -> dict[str, Any]:
    """`merge:` of params.yaml over models/, into merged/; the report."""
    recipe = load_params(root / params_file).recipe().rooted(root)
    report = merge(
        recipe,
        root / "merged",
        _device(),
        executor=_executor(),
        sources=_pinned(root),
        staging=_staging(root),
        sha256=True,
    )
    return report.document()


def merge_baselines(params_file: Path, root: Path) -> dict[str, Any]:
    """Every recipe of `baselines:` over models/, into baselines/<name>/; the reports by name."""
    params = load_params(root / params_file)
    directory = root / "baselines"
    directory.mkdir(exist_ok=True)
    for stale in sorted(set(directory.iterdir()) - {directory / name for name in params.baselines}):
        require_replaceable(stale)
        shutil.rmtree(stale)
    reports = {}
    for name in params.baselines:
        recipe = params.recipe(name).rooted(root)
        out = directory / name
        reports[name] = merge(
            recipe, out, _device(), executor=_executor(), staging=_staging(root), card=False
        ).document()
    return reports


def _staging(root: Path) -> Path:
    # A run works in a checkout of its own that the next run does not see: what it had merged is found in the project.
    return settings.project_root(root) / STAGING


def _device() -> str:
    return settings.devices()


def _executor() -> str:
    return settings.executor()


def _pinned(root: Path) -> dict[str, Mapping[str, Any]]:
    """Model entries of sources.lock.json by name; none without a lock, as when models/ was filled by hand."""
    file = root / LOCK
    if not file.is_file():
        return {}
    try:
        pinned = json.loads(file.read_text(encoding="utf-8"))["pinned"]
        return {entry["name"]: entry for entry in pinned.values() if entry["kind"] == "model"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"is not a lock file: {error}", where=str(file), hint="run `modelweld pin`") from error


def report_of(
    out: Path,
    recipe: Recipe,
    plan: Plan,
    execution: Execution,
    document: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> MergeReport:
    """The report of one published merge."""
    merged = sum(tensor.action == "merge" for tensor in plan.tensors)
    return MergeReport(
        out=out,
        manifest_digest=manifest.digest(document),
        model_digest=document["output"]["model_digest"],
        method=recipe.method_name,
        merged=merged,
        copied=len(plan.tensors) - merged,
        resumed=execution.resumed,
        heads=tuple(head.task for head in plan.heads),
        left_out=plan.left_out,
        notes=(*plan.notes, *execution.notes),
        delta_survival=document["delta_survival"],
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_resident() + execution.workers_peak_bytes,
    )
