"""The report: everything a finished pipeline left behind, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelweld.alignment.landscape import landscape, stored_landscape
from modelweld.errors import InputError
from modelweld.evaluation.scores import scoreboard
from modelweld.formats import AlignmentRecord, Manifest
from modelweld.formats.alignment import FILE as ALIGNMENT
from modelweld.formats.manifest import FILE
from modelweld.reporting import write_report

DEFAULT_OUT = Path(".modelweld") / "report"


def report(root: Path, out: Path | None = None, name: str | None = None, *, steps: int | None = None) -> dict[str, Any]:
    """Write index.html and its plots from scores/, predictions/ and merged/; returns where, and the board.

    The page shows the tasks that have scores. Without a merge there is no lineage on it. With `steps` the landscape of
    the merge is computed first, on that many points a side; one that was computed earlier is shown again. InputError
    without scores.
    """
    folder = out or root / DEFAULT_OUT
    board = scoreboard(root)
    merged = root / "merged"
    manifest = Manifest.read_if_present(merged / FILE)
    plane = None
    if manifest is not None:
        plane = landscape(root / "params.yaml", root, steps=steps) if steps else stored_landscape(root)
    try:
        page = write_report(
            folder,
            board,
            name=name or _name(root),
            predictions=root / "predictions",
            manifest=manifest,
            alignment=AlignmentRecord.read_if_present(merged / ALIGNMENT),
            landscape=plane,
        )
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from error
    return {"report": str(page), "scores": board.summary().data()}


def _name(root: Path) -> str:
    """The pipeline's own name where params.yaml is at hand, else the folder's."""
    import yaml

    try:
        document = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return root.resolve().name
    return str(document.get("name", root.resolve().name)) if isinstance(document, dict) else root.resolve().name
