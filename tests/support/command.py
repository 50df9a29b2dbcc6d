"""The `modelweld` command and git in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.toy import environment

MODELWELD = str(Path(sys.executable).with_name("modelweld"))


def clean_environment(**more: str) -> dict[str, str]:
    names = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "MODELWELD_PROJECT_ROOT")
    return {key: value for key, value in environment(**more).items() if key not in names or key in more}


def modelweld(where: Path, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [MODELWELD, *words], cwd=where, env=clean_environment(**more), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def git(where: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=where, check=True, capture_output=True, text=True).stdout


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout)
    return document
