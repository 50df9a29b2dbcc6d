"""A first project: git, DVC with a local remote, the stage graph, a params.yaml to edit. Nothing is overwritten."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from modelweld.errors import WorkspaceError

IGNORED = """\
# what the pipeline makes: versioned by DVC, never by git
/models/
/datasets/
/merged/
/baselines/
/predictions/
/validation/
/scores/
/sources.lock.json
/.modelweld/
/mlflow.db
"""
# DVC reads every dvc.yaml below a repository's top, this package's own included: the template has another name.
TEMPLATES = {
    "dvc.yaml": "graph.yaml",
    "params.yaml": "params.yaml",
    "expectations/README.md": "expectations/README.md",
}
DVC_OPTIONS = {
    "core.analytics": "false",
    "core.autostage": "false",
    # Reflinks alone fail on ext4; a copy is the last resort because it doubles every model.
    "cache.type": "reflink,hardlink,symlink,copy",
}


def initialise(root: Path) -> dict[str, str]:
    """What was done for each part of the project: `written` or `kept`."""
    root.mkdir(parents=True, exist_ok=True)
    done: dict[str, str] = {}
    (root / "expectations").mkdir(exist_ok=True)
    templates = files(__package__).joinpath("project")
    for name, template in TEMPLATES.items():
        done[name] = _write(root / name, templates.joinpath(*template.split("/")).read_text(encoding="utf-8"))
    done[".gitignore"] = _write(root / ".gitignore", IGNORED)
    if (root / ".git").exists():
        done["git"] = "kept"
    else:
        _run(root, "git", "init", "--quiet")
        done["git"] = "written"
    if (root / ".dvc").exists():
        done["dvc"] = "kept"
    else:
        dvc = (sys.executable, "-m", "dvc")
        _run(root, *dvc, "init", "--quiet")
        for option, value in DVC_OPTIONS.items():
            _run(root, *dvc, "config", "--quiet", option, value)
        _run(root, *dvc, "remote", "add", "--quiet", "--default", "store", ".modelweld/dvc-remote")
        done["dvc"] = "written"
    return done


def _write(path: Path, content: str) -> str:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return "kept"
    return "written"


def _run(root: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise WorkspaceError(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}",
            where=str(root),
            hint="see that git is installed and the folder is writable",
        )
