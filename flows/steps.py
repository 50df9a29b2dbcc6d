"""The tasks of the flows. DVC decides what a stage does; Prefect retries it, times it, logs it and shows the result.

Every task has `cache_policy=NO_CACHE`: DVC alone decides what is stale, and a second cache answers with old paths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from modelweld.errors import ExternalError, GateRefused
from modelweld.flows.pinning import pin_sources
from modelweld.flows.summary import score_rows
from modelweld.registry.connection import tracking_uri
from modelweld.registry.from_record import Outcome, register_record
from modelweld.registry.promotion import current_actor
from modelweld.sources import Change
from modelweld.workspace import Project, Record, Worktree
from modelweld.workspace.failures import is_advice
from modelweld.workspace.worktree import Repro


@dataclass(frozen=True)
class RetryPolicy:
    """How long a stage may take, and after which pauses it is tried again."""

    timeout_s: float
    retry_delays_s: tuple[float, ...]


def log_progress(message: str, **facts: Any) -> None:
    """Log `message` on the run's page. `modelweld` marks it, with its facts, as one for the terminal as well."""
    get_run_logger().info("%s", message, extra={"modelweld": facts})


@task(cache_policy=NO_CACHE, task_run_name="pin")
def pin(tree: Worktree, *, frozen: bool) -> list[Change]:
    """How every source differs from the lock before: sources.lock.json is written into the worktree."""
    found = pin_sources(tree, frozen=frozen)
    if frozen:
        log_progress("sources: taken as they were pinned")
        return found
    moved = [change for change in found if change.what != "same"]
    log_progress(f"sources: {len(found)} pinned, " + (", ".join(f"{c.key} {c.what}" for c in moved) or "all as before"))
    return found


def stages(tree: Worktree, policy: RetryPolicy) -> list[Callable[[], Repro]]:
    """One task per stage group of dvc.yaml, in order; each runs when it is called.

    They come one after the other: two DVC processes in one worktree end each other. Runs side by side have their own.
    """
    stale = set(tree.affected(tree.stale_stages()))
    return [
        functools.partial(_run(group, policy), tree, group, len(stale.intersection(members)), policy.timeout_s)
        for group, members in tree.graph.groups.items()
    ]


def _run(group: str, policy: RetryPolicy) -> Task[[Worktree, str, int, float], Repro]:
    return run_stage.with_options(
        name=group,
        task_run_name=group,
        retries=len(policy.retry_delays_s),
        retry_delay_seconds=list(policy.retry_delays_s),
        retry_condition_fn=is_transient,
    )


@task(cache_policy=NO_CACHE)
def run_stage(tree: Worktree, group: str, stale_count: int, timeout_s: float) -> Repro:
    """What DVC did for `group`: the child process's lines are logged as they come.

    The time limit is kept by the child's supervisor: Prefect's own cannot end a process.
    """
    log_progress(f"{group}: starts, {stale_count} of {len(tree.graph.groups[group])} stale", stage=group)
    log = get_run_logger()

    def on_line(line: str) -> None:
        if not is_advice(line):
            log.info("%s", line, extra={"modelweld": {"stage": group, "line": True}})

    done = tree.repro(group, on_line=on_line, timeout_s=timeout_s)
    log_progress(f"{group}: {_summary(done)}", stage=group, seconds=done.seconds)
    return done


def is_transient(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help: something outside failed (exit code 3) or another DVC was at work."""
    return isinstance(state.result(raise_on_failure=False), ExternalError)


def _summary(done: Repro) -> str:
    said = [f"{len(names)} {what}" for names, what in ((done.ran, "ran"), (done.restored, "brought back")) if names]
    return ", ".join(said) or "nothing to do"


@task(cache_policy=NO_CACHE, task_run_name="record")
def record(tree: Worktree, *, to_registry: bool) -> Record:
    """The run's tag. What is still to be done with it is noted first, so that it can be finished after any failure."""
    from prefect.runtime import flow_run

    made = tree.record(flow_run_id=flow_run.id)
    tree.project.mark_unfinished(made, ("push", "register") if to_registry else ("push",))
    log_progress(f"record: {made.tag}")
    return made


@task(cache_policy=NO_CACHE, task_run_name="push", retries=2, retry_delay_seconds=[2, 10])
def push(project: Project, made: Record) -> None:
    """Everything the record names is in the DVC remote; nothing is done when it was already."""
    if "push" not in project.missing_steps(made):
        return
    try:
        project.push(made)
    except ExternalError as error:
        kept = f"the merge is kept as {made.tag}; finish it with `modelweld register {made.tag}`"
        raise type(error)(error.what, where=error.where, hint=f"{error.hint or 'see the remote'}; {kept}") from error
    project.mark_done(made, "push")
    log_progress("push: everything is in the DVC remote")


@task(cache_policy=NO_CACHE, task_run_name="register", retries=1, retry_delay_seconds=5)
def register(project: Project, made: Record) -> Outcome | None:
    """The record's version in MLflow, gated; None when it was registered before or is not to be."""
    if "register" not in project.missing_steps(made):
        return None
    try:
        found = register_record(project.root, made.tag, at=datetime.now(UTC), actor=current_actor(project.root))
    except ExternalError as error:
        kept = f"the merge is kept as {made.tag}; finish it with `modelweld register {made.tag}`"
        raise type(error)(error.what, where=error.where, hint=f"{error.hint or 'start MLflow'}; {kept}") from error
    project.mark_done(made, "register")
    return found


def register_and_gate(project: Project, made: Record) -> Outcome | None:
    """The registered version, shown on the run's page; GateRefused when it may not be challenger."""
    found = register(project, made)
    if found is None:
        return None
    _show_version(project, found)
    if not found.decision.passed:
        raise GateRefused(
            f"registered without an alias: {found.decision.explain()}",
            where=found.registered.uri,
            hint="see `register:` in params.yaml, or promote it with --override REASON",
        )
    return found


def show_scores(made: Record) -> None:
    """A table artifact with every system's score on every task, under a key of its own for each model."""
    if rows := score_rows(made):
        create_table_artifact(rows, key=_key("scores", made.name), description=f"Scores of `{made.tag}`")


def _show_version(project: Project, found: Outcome) -> None:
    made, where = found.registered, tracking_uri(project.root)
    key = _key("version", made.name)
    aliases = ", ".join(alias for alias, number in found.aliases.items() if number == made.version) or "none"
    facts = f"`{made.uri}`, aliases: {aliases}, from `{made.record}`\n\n{found.decision.explain()}"
    if where.startswith(("http://", "https://")):
        page = f"{where.rstrip('/')}/#/models/{made.name}/versions/{made.version}"
        create_link_artifact(link=page, link_text=made.uri, key=key, description=facts)
    else:
        show = f"mlflow ui --backend-store-uri {where}"
        create_markdown_artifact(f"# {made.uri}\n\n{facts}\n\nSee it: `{show}`\n", key=key, description=made.record)
    log_progress(f"register: {made.uri} (aliases: {aliases})")


def _key(kind: str, name: str) -> str:
    # Prefect's artifact keys know lowercase letters, digits and dashes only.
    return f"{kind}-{name.replace('_', '-')}"
