"""Where one run works: a git worktree of its own over the project's DVC cache."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modelweld import settings, stage_errors
from modelweld.errors import GateRefused, WorkspaceError
from modelweld.formats.gate import Gate
from modelweld.workspace import failures, graph, processes, records
from modelweld.workspace.processes import LineCallback
from modelweld.workspace.records import Record
from modelweld.workspace.reproduce import RUNNING

if TYPE_CHECKING:
    from modelweld.workspace.repository import Project

DVC = (sys.executable, "-m", "dvc")
# -P: this folder must not be on the path of imports, where its git.py would hide DVC's.
REPRODUCE = (sys.executable, "-P", str(Path(__file__).with_name("reproduce.py")))


@dataclass(frozen=True)
class Repro:
    """What `repro` of one group did: the stages DVC ran, those it brought back instead, and how long it took."""

    group: str
    ran: tuple[str, ...]
    restored: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Worktree:
    """One run's own checkout. `path` is the project's folder in it; stages of two worktrees never meet."""

    project: Project
    run_id: str
    path: Path
    dirty: bool = False
    started_from: Record | None = None

    @functools.cached_property
    def graph(self) -> graph.Graph:
        """The stage graph of this worktree's dvc.yaml, params.yaml and sources.lock.json, read when first asked for."""
        return graph.read(self.path, self.project.root)

    def groups(self) -> list[str]:
        """The stage groups of dvc.yaml, in the order in which they run."""
        return list(self.graph.groups)

    def stale_stages(self) -> list[str]:
        """The stages whose inputs changed since the lock this worktree started from; empty when nothing is to do.

        Missing outputs that DVC could bring back do not count. What lies downstream may follow: see `affected`.
        """
        return list(self.graph.stale)

    def affected(self, stale: list[str]) -> list[str]:
        """`stale` and whatever their outputs can reach, in running order."""
        reached = set(stale).union(*(self.graph.downstream.get(stage, frozenset()) for stage in stale))
        return [stage for stages in self.graph.groups.values() for stage in stages if stage in reached]

    def repro(self, group: str, *, on_line: LineCallback | None = None, timeout_s: float | None = None) -> Repro:
        """Run what is stale in `group` and bring back the rest, in a child process; then link outputs to the cache.

        Raises GateRefused, InputError or ExternalError as the stage's own exit code said, StageBusy when another DVC
        works in this worktree.
        """
        stages = self.graph.groups.get(group)
        if stages is None:
            raise WorkspaceError(
                f"dvc.yaml has no stage {group!r}", where=str(self.path), hint=f"one of: {', '.join(self.graph.groups)}"
            )
        started = time.monotonic()
        ended = self._repro("--pull", *stages, group=group, on_line=on_line, timeout_s=timeout_s)
        ran, restored = _what_happened(ended.lines)
        return Repro(group, ran, restored, time.monotonic() - started)

    def force_repro(self, stage: str, *, on_line: LineCallback | None = None) -> None:
        """Run `stage` whether or not it is stale; its inputs have to be here already."""
        self._repro("--force", stage, group=stage, on_line=on_line, timeout_s=None)

    def push(self, *, on_line: LineCallback | None = None) -> None:
        """Send everything this worktree's dvc.lock names to the DVC remote; RemoteUnavailable when it is not taken."""
        ended = self._run([*DVC, "push"], on_line=on_line)
        if ended.code != 0:
            raise failures.of_push(ended)

    def gate_verdict(self) -> Literal["pass", "fail"] | None:
        """What the validation gate said, None when this graph has no gate."""
        gate = Gate.read_if_present(self.path / "validation" / "gate.json")
        return None if gate is None else gate.verdict

    def record(self, *, flow_run_id: str | None = None) -> Record:
        """Commit the lock, the parameters, the gate and the scores beside main, under an annotated tag.

        Refuses (GateRefused) a run whose validation gate said no.
        """
        verdict = self.gate_verdict()
        if verdict == "fail":
            raise GateRefused("the validation gate refused this run", where=str(self.path / "validation/gate.json"))
        wanted = ("params.yaml", "sources.lock.json", "dvc.lock", *self.graph.kept_by_git)
        return records.write(
            self.path,
            root=self.project.root,
            name=self.name,
            run_id=self.run_id,
            files=[path for path in wanted if (self.path / path).exists()],
            verdict=verdict,
            flow_run_id=flow_run_id,
            dirty=self.dirty,
        )

    @functools.cached_property
    def name(self) -> str:
        """The model's name, as params.yaml in this worktree gives it."""
        from modelweld.config import load_params

        return load_params(self.path / "params.yaml").name

    def restore(self, record: Record) -> None:
        """Start from what `record` knows: its dvc.lock and the files git keeps for it, not its data."""
        paths = ["dvc.lock", *record.files("validation"), *record.files("scores")]
        if not (self.path / "sources.lock.json").exists():
            paths.append("sources.lock.json")
        for path in paths:
            target = self.path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(record.read(path))

    def _repro(
        self, *words: str, group: str, on_line: LineCallback | None, timeout_s: float | None
    ) -> processes.ProcessResult:
        with tempfile.TemporaryDirectory(prefix="modelweld-error-") as folder:
            file = Path(folder) / "error.json"
            ended = self._run(
                [*REPRODUCE, "--single-item", *words],
                on_line=on_line,
                timeout_s=timeout_s,
                environment={settings.ERROR_FILE: str(file)},
            )
            if ended.code != 0:
                raise failures.of_stage(ended, group, timeout_s, stage_errors.read(file))
        return ended

    def _run(
        self,
        command: list[str],
        *,
        on_line: LineCallback | None,
        timeout_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> processes.ProcessResult:
        return processes.run(
            command,
            cwd=self.path,
            environment={**processes.environment(self.project.root), **(environment or {})},
            on_line=on_line,
            timeout_s=timeout_s,
        )


def _what_happened(lines: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    ran: list[str] = []
    restored: list[str] = []
    for line in lines:
        if match := RUNNING.match(line):
            ran.append(match["stage"])
        elif "is cached - skipping run" in line or line.startswith("Pulling data for stage"):
            restored.append(line.split("'")[1])
    return tuple(ran), tuple(restored)
