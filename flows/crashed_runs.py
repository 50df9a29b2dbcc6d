"""Runs whose process died without reporting a final state: Prefect would show them as running for ever."""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from modelweld.flows.steps import log_progress
from modelweld.workspace import Project, RunState


def report_crashed_runs(project: Project) -> list[RunState]:
    """The runs of this project that this call reported as crashed: their process is gone and their state was not final.

    A run is dead when nobody holds its lock file, which the kernel releases however its process ends.
    """
    dead = [state for state in project.runs() if not state.alive and state.flow_run_id]
    if not dead:
        return []
    reported: list[RunState] = []
    with get_client(sync_client=True) as client:
        for run in dead:
            try:
                state = client.read_flow_run(UUID(run.flow_run_id)).state
            except ObjectNotFound:
                continue  # it was another server's
            if state is None or state.is_final():
                continue
            message = f"its process is gone; what it had done is in {run.path}"
            client.set_flow_run_state(UUID(run.flow_run_id), Crashed(message=message), force=True)
            log_progress(f"run {run.run_id} had died: reported as crashed; {message}")
            reported.append(run)
    return reported
