"""Whether a run would do nothing, asked of git and DVC alone: a run that does nothing needs no Prefect server."""

from __future__ import annotations

from modelweld.flows.pinning import pin_sources
from modelweld.workspace import Project, Record

# Where one of these differs from the record, some stage is most likely stale: the flow finds out which.
DECIDING = ("params.yaml", "dvc.yaml")


def unchanged_since(project: Project, *, frozen: bool) -> Record | None:
    """The newest record, where the flow would run no stage and finish nothing; None where it may have something to do.

    Answers as the flow would, from the same worktree, pins and DVC status. None as well where an earlier run left a
    step undone or died unreported: both are the flow's to settle. Expects a project without uncommitted changes.
    """
    known = project.latest_record(project.name)
    if known is None or project.missing_steps(known) or any(_died(project)):
        return None
    if any(project.committed(path) != known.find(path) for path in DECIDING):
        return None
    with project.worktree(keep_on_error=False) as tree:
        pin_sources(tree, frozen=frozen)
        return None if tree.stale_stages() else known


def _died(project: Project) -> list[str]:
    return [run.run_id for run in project.runs() if run.flow_run_id and not run.alive]
