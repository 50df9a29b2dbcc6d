"""Re-derive or refuse: make a recorded merge again from its recorded inputs and compare the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from modelweld.errors import WorkspaceError
from modelweld.workspace.processes import LineCallback
from modelweld.workspace.records import Record

if TYPE_CHECKING:
    from modelweld.workspace.repository import Project


@dataclass(frozen=True)
class Rederived:
    """An output's digest as recorded and as made again (DVC's MD5)."""

    record: str
    output: str
    stage: str
    recorded: str
    rebuilt: str

    @property
    def equal(self) -> bool:
        return self.recorded == self.rebuilt


def rederive(
    project: Project, record: Record, output: str = "merged", *, on_line: LineCallback | None = None
) -> Rederived:
    """What `record`'s stage makes of the same inputs today, beside what it made then.

    Works in a temporary worktree at the record; inputs come from the cache or the remote. The stage itself always runs,
    whatever DVC remembers of it.
    """
    stage, recorded = _made_by(record.read("dvc.lock").decode(), output, record.tag)
    with project.checkout(record.tag) as tree:
        for group in tree.groups():
            if group == stage:
                break
            tree.repro(group, on_line=on_line)
        tree.force_repro(stage, on_line=on_line)
        _, rebuilt = _made_by((tree.path / "dvc.lock").read_text(encoding="utf-8"), output, record.tag)
    return Rederived(record.tag, output, stage, recorded, rebuilt)


def _made_by(lock: str, output: str, where: str) -> tuple[str, str]:
    """The stage that makes `output`, and the digest its lock gives it."""
    outputs: list[str] = []
    for stage, entry in yaml.safe_load(lock)["stages"].items():
        for out in entry.get("outs", ()):
            if out["path"] == output:
                return stage, out["md5"]
            outputs.append(out["path"])
    raise WorkspaceError(f"no output {output!r} in this record", where=where, hint=f"one of: {', '.join(outputs)}")
