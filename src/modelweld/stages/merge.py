"""The merge stage: a recipe and its models in, a merged directory out, complete or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from modelweld import settings
from modelweld.checkpoints.shards import disk_errors
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
from modelweld.formats.lock import LOCK_NAME, Lock, Pinned
from modelweld.formats.manifest import FILE, Manifest
from modelweld.lineage import manifest, model_card

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

    def data(self) -> dict[str, Any]:
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
    sources: Mapping[str, Pinned] | None = None,
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
            written = manifest.build(
                recipe,
                plan,
                inputs,
                execution,
                tree,
                device=placement.kind,
                sources=sources,
                sha256=sha256,
                alignment=alignment.summary() if alignment is not None else None,
                repair=repair,
            )
            with disk_errors(tree / FILE):
                written.write(tree / FILE)
            if card:
                (tree / "README.md").write_text(model_card.render(written), encoding="utf-8")
            publish(directory, out)
    took = {"align": matched - planned} if alignment is not None else {}
    seconds = {"plan": planned - started, **took, **execution.seconds, "manifest": time.perf_counter() - executed}
    return report_of(out, recipe, plan, execution, written, seconds)


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
    return report.data()


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
        reports[name] = merge(recipe, out, _device(), executor=_executor(), staging=_staging(root), card=False).data()
    return reports


def _staging(root: Path) -> Path:
    # A run works in a checkout of its own that the next run does not see: what it had merged is found in the project.
    return settings.project_root(root) / STAGING


def _device() -> str:
    return settings.devices()


def _executor() -> str:
    return settings.executor()


def _pinned(root: Path) -> Mapping[str, Pinned]:
    """Model entries of sources.lock.json by name; none without a lock, as when models/ was filled by hand."""
    lock = Lock.read_if_present(root / LOCK_NAME)
    return lock.entries("model") if lock is not None else {}


def report_of(
    out: Path,
    recipe: Recipe,
    plan: Plan,
    execution: Execution,
    written: Manifest,
    seconds: Mapping[str, float],
) -> MergeReport:
    """The report of one published merge."""
    merged = sum(tensor.action == "merge" for tensor in plan.tensors)
    return MergeReport(
        out=out,
        manifest_digest=written.digest,
        model_digest=written.output.model_digest,
        method=recipe.method_name,
        merged=merged,
        copied=len(plan.tensors) - merged,
        resumed=execution.resumed,
        heads=tuple(head.task for head in plan.heads),
        left_out=plan.left_out,
        notes=(*plan.notes, *execution.notes),
        delta_survival=written.delta_survival.data() if written.delta_survival else None,
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_resident() + execution.workers_peak_bytes,
    )
