"""The mission as one flow: fetch finetuned models → validate → merge → evaluate on every task → register.

Run it: modelweld run. Schedule it: prefect --no-prompt deploy --all (see prefect.yaml).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from modelweld.flows.crashed_runs import report_crashed_runs
from modelweld.flows.steps import (
    RetryPolicy,
    log_progress,
    pin,
    push,
    record,
    register_and_gate,
    show_scores,
    stages,
)
from modelweld.flows.summary import merge_notes, outcome
from modelweld.workspace import Project

HOUR_S = 3600.0


@flow(name="merge")
def merge(
    project: str = ".",
    frozen: bool = False,
    allow_dirty: bool = False,
    to_registry: bool = True,
    stage_timeout_s: float = 12 * HOUR_S,
    retry_delays_s: tuple[float, ...] = (5.0, 30.0),
) -> dict[str, Any]:
    """What was merged, scored and registered, or that nothing had changed; one run in a git worktree of its own.

    `frozen` takes sources.lock.json as it is; `allow_dirty` runs uncommitted changes and records that it did;
    `to_registry=False` ends after the record is pushed. A stage is tried again after each of `retry_delays_s` when
    something outside failed, never when a gate refused or the input is bad.
    """
    home = Project.find(Path(project))
    report_crashed_runs(home)
    with home.worktree(allow_dirty=allow_dirty, flow_run_id=flow_run.id) as tree:
        pin(tree, frozen=frozen)
        known = tree.started_from
        if known and not tree.stale_stages():
            log_progress(f"nothing changed since {known.tag}")
            made, done, notes = known, [], []
        else:
            done = [stage() for stage in stages(tree, RetryPolicy(stage_timeout_s, retry_delays_s))]
            made = record(tree, to_registry=to_registry)
            show_scores(made)
            notes = merge_notes(tree)
    push(home, made)
    return outcome(made, done, notes, register_and_gate(home, made))
