"""dvc.yaml as DVC itself reads it: the groups in their order, what is stale, which outputs git keeps.

DVC's objects resolve names against the process's directory and set up logging for the whole of it, so the reading is
done by a child, this module run at the top of the worktree: it prints one JSON document.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx

from modelweld.errors import ExternalError, WorkspaceError
from modelweld.workspace.processes import environment

JOIN = "@"
PROJECT_FILE = "dvc.yaml"


@dataclass(frozen=True)
class Graph:
    """The stage graph: `groups` (a `foreach` stage is one group) with their stages, both in the order DVC runs them.

    `downstream` holds what each stage's outputs reach, `kept_by_git` the outputs with `cache: false`, `stale` the
    stages DVC would run now (outputs that are missing but could be brought back do not count).
    """

    groups: dict[str, tuple[str, ...]]
    downstream: dict[str, frozenset[str]]
    kept_by_git: tuple[str, ...]
    stale: tuple[str, ...]


def read(tree: Path, project_root: Path) -> Graph:
    """The graph of the dvc.yaml in `tree`; WorkspaceError in DVC's own words when DVC cannot read it."""
    done = subprocess.run(  # noqa: S603 - this interpreter, this module
        [sys.executable, "-m", __name__],
        cwd=tree,
        env=environment(project_root),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise WorkspaceError(f"DVC could not be asked: {done.stderr.strip()[-2000:]}", where=str(tree))
    said: dict[str, Any] = json.loads(done.stdout)
    if "error" in said:
        raise WorkspaceError(said["error"], where=str(tree / PROJECT_FILE), hint=said.get("hint"))
    return Graph(
        groups={group: tuple(stages) for group, stages in said["groups"].items()},
        downstream={stage: frozenset(reached) for stage, reached in said["downstream"].items()},
        kept_by_git=tuple(said["kept_by_git"]),
        stale=tuple(said["stale"]),
    )


def _describe() -> dict[str, Any]:
    """The graph of the current directory's dvc.yaml, as plain lists."""
    from dvc.dependency import ParamsDependency
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with opened(Path()) as repo:
        active = get_active_graph(repo.index.graph)
        # Only the project's own dvc.yaml and what it needs: a folder below may hold another pipeline.
        plan = [stage for stage in plan_repro(active, collect_stages(repo, [PROJECT_FILE])) if stage.cmd]
        members: dict[str, list[str]] = {}
        for stage in plan:
            members.setdefault(_group(stage), []).append(stage.addressing)
        ours = active.subgraph(plan)
        for parameters in (dep for stage in plan for dep in stage.deps if isinstance(dep, ParamsDependency)):
            parameters.get_hash()  # raises where a key is missing, which the stage itself would do much later
        with repo.lock:
            # What `dvc repro --dry --allow-missing` asks; that itself fails where an input was never made.
            stale = [stage.addressing for stage in plan if stage.changed(True, list(active.successors(stage)))]
        return {
            "groups": {group: members[group] for group in _in_order(members, ours)},
            "downstream": {
                stage.addressing: sorted(reached.addressing for reached in networkx.ancestors(ours, stage))
                for stage in plan
            },
            "kept_by_git": sorted(
                Path(out.fs_path).relative_to(repo.root_dir).as_posix()
                for stage in plan
                for out in stage.outs
                if not out.use_cache
            ),
            "stale": stale,
        }


def _in_order(members: dict[str, list[str]], stages: Any) -> list[str]:
    between = networkx.DiGraph()
    between.add_nodes_from(members)
    # DVC's edges point from a stage to what it needs.
    edges = ((_group(needed), _group(stage)) for stage, needed in stages.edges)
    between.add_edges_from(edge for edge in edges if edge[0] != edge[1])
    rank = {group: place for place, group in enumerate(members)}
    try:
        return list(networkx.lexicographical_topological_sort(between, key=rank.__getitem__))
    except networkx.NetworkXUnfeasible as error:
        loop = " → ".join(group for group, _ in networkx.find_cycle(between))
        raise WorkspaceError(
            f"the foreach stages {loop} wait for one another",
            hint="split one of them into two stages with names of their own",
        ) from error


def _group(stage: Any) -> str:
    address: str = stage.addressing
    return address.split(JOIN, 1)[0]


@contextmanager
def opened(tree: Path) -> Iterator[Any]:
    """DVC's own repository object for `tree`, quiet, closed afterwards; its exceptions become this project's."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    try:
        with Repo(str(tree)) as repo:
            yield repo
    except LockError as error:
        raise ExternalError("DVC is busy in this workspace", where=str(tree), hint="wait for the other run") from error
    except DvcException as error:
        raise WorkspaceError(f"DVC says: {_chain(error)}", where=str(tree), hint=_hint_for(_chain(error))) from error


def _hint_for(message: str) -> str | None:
    if "are missing from" in message:
        return "give each of them in that file; `{}` takes every default of a section"
    return "`modelweld pin` writes it" if "'sources.lock.json' does not exist" in message else None


def _chain(error: BaseException) -> str:
    said: list[str] = []
    link: BaseException | None = error
    while link is not None:
        if str(link) and str(link) not in said:
            said.append(str(link))
        link = link.__cause__
    return ": ".join(said)


def main() -> None:
    """Print the graph of the current directory as JSON, or the error that DVC met."""
    # DVC prints what it would run; the answer is to stand alone on standard output.
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        said = _describe()
    except (WorkspaceError, ExternalError) as error:
        said = {"error": error.what, "hint": error.hint}
    json.dump(said, answer)


if __name__ == "__main__":
    main()
