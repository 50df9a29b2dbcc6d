"""The report: everything a finished pipeline left behind, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelweld.alignment import DOCUMENT
from modelweld.alignment.landscape import landscape, stored_landscape
from modelweld.checkpoints.checkpoint import read_json
from modelweld.errors import InputError
from modelweld.evaluation.scores import scoreboard
from modelweld.lineage.manifest import FILE, read
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
    manifest = read(merged) if (merged / FILE).is_file() else None
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
            alignment=read_json(merged / DOCUMENT) if (merged / DOCUMENT).is_file() else None,
            landscape=plane,
        )
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from error
    return {"report": str(page), "scores": board.to_dict()}


def _name(root: Path) -> str:
    """The pipeline's own name where params.yaml is at hand, else the folder's."""
    import yaml

    try:
        document = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return root.resolve().name
    return str(document.get("name", root.resolve().name)) if isinstance(document, dict) else root.resolve().name
