"""What the environment says about this machine and this process: every MODELWELD_* variable that is read, once.

Read when asked, never at import. Where a merge runs, or who acts, is the machine's matter: in params.yaml it would make
dvc.lock depend on it.
"""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_ROOT = "MODELWELD_PROJECT_ROOT"
DEVICE = "MODELWELD_DEVICE"
EXECUTOR = "MODELWELD_EXECUTOR"
ACTOR = "MODELWELD_ACTOR"
CACHE_DIR = "MODELWELD_CACHE_DIR"
DVC_REPO = "MODELWELD_DVC_REPO"
ERROR_FILE = "MODELWELD_ERROR_FILE"


def project_root(otherwise: Path) -> Path:
    """The project that a run belongs to, also inside the run's own worktree; `otherwise` outside of a run."""
    return Path(_value(PROJECT_ROOT) or otherwise)


def devices() -> str:
    """Where merges run: `auto`, or the device or devices that MODELWELD_DEVICE names."""
    return _value(DEVICE) or "auto"


def first_device() -> str:
    """The first of `devices()`: where a model that needs one device runs."""
    return devices().partition(",")[0]


def executor() -> str:
    """What spreads a merge: `local`, or what MODELWELD_EXECUTOR names (`ray:HOST:PORT`)."""
    return _value(EXECUTOR) or "local"


def actor() -> str | None:
    """Who acts, for the ledger; None where MODELWELD_ACTOR does not say."""
    return _value(ACTOR)


def cache_directory() -> Path:
    """MODELWELD_CACHE_DIR, or ~/.cache/modelweld: weights of registered versions, shared by all projects."""
    return Path(_value(CACHE_DIR) or Path.home() / ".cache" / "modelweld")


def dvc_repository() -> str | None:
    """The clone, or the git URL, that holds the weights of versions; None where their own address is right."""
    return _value(DVC_REPO)


def error_file() -> Path | None:
    """Where the error of this process goes as JSON; None where no caller asked for it."""
    named = _value(ERROR_FILE)
    return Path(named) if named else None


def _value(name: str) -> str | None:
    return os.environ.get(name) or None
