"""What would stop a run on this machine: one finding per check, each with a fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from modelweld.config import load_params
from modelweld.errors import ConfigError

# Two caps that pip's own check does not know: see pyproject.toml.
CAPS = {"fastapi": (0, 151), "sqlalchemy": (2, 1)}
TOOLS = ("torch", "transformers", "datasets", "prefect", "mlflow", "dvc", "great-expectations")
LEAST_FREE_BYTES = 5_000_000_000

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    check: str
    state: State
    saw: str
    hint: str = ""


def diagnose(root: Path) -> list[Finding]:
    """Every finding about the project at `root` and the machine it is on; nothing is changed and nothing is sent."""
    return [
        *_packages(),
        *_device(),
        *_git(root),
        *_dvc(root),
        *_configuration(root),
        *_disk(root),
        *_registry(),
    ]


def _packages() -> Iterator[Finding]:
    for name in (*TOOLS, *CAPS):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(
                f"package {name}", "problem", "not installed", f"pip install --constraint constraints.txt {name}"
            )
            continue
        cap = CAPS.get(name)
        if cap and tuple(int(part) for part in found.split(".")[:2]) >= cap:
            limit = ".".join(str(part) for part in cap)
            yield Finding(
                f"package {name}", "problem", found, f"pip install '{name}<{limit}': newer ones break Prefect 3.8"
            )
        else:
            yield Finding(f"package {name}", "ok", found)


def _device() -> Iterator[Finding]:
    if not _may_have_gpu():
        yield Finding("device", "ok", f"no GPU; {_cores()} CPU cores")
        return
    # Here, because it takes seconds: only torch knows which devices it can use.
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        yield Finding("device", "ok", f"{count} x {torch.cuda.get_device_name(0)}")
    elif torch.backends.mps.is_available():
        yield Finding("device", "ok", "Apple GPU (mps)")
    else:
        yield Finding("device", "ok", f"no GPU that torch can use; {_cores()} CPU cores")


def _may_have_gpu() -> bool:
    """Whether this machine can have a device that torch uses: an NVIDIA or AMD driver, or macOS or Windows."""
    drivers = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return not sys.platform.startswith("linux") or any(Path(driver).exists() for driver in drivers)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _git(root: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "problem", "not installed", "install git 2.30 or newer")
        return
    inside = _ask(root, "git", "rev-parse", "--show-toplevel")
    if inside is None:
        yield Finding("git", "problem", "not a git repository", "modelweld init")
    elif _ask(root, "git", "rev-parse", "--verify", "--quiet", "HEAD") is None:
        yield Finding("git", "problem", "no commit yet", "git add --all && git commit")
    else:
        changed = _ask(root, "git", "status", "--porcelain", "--untracked-files=no")
        if changed:
            yield Finding("git", "warning", "tracked files are changed", "commit them, or run with --allow-dirty")
        else:
            yield Finding("git", "ok", "clean")


def _dvc(root: Path) -> Iterator[Finding]:
    if not (root / ".dvc").is_dir():
        yield Finding("dvc", "problem", "not initialised here", "modelweld init")
        return
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError

    try:
        remotes = Config(str(root / ".dvc"), validate=False).get("remote", {})
    except DvcConfigError as error:
        yield Finding("dvc", "problem", str(error), "correct .dvc/config")
        return
    if remotes:
        yield Finding("dvc", "ok", "; ".join(f"remote {name} {remote.get('url')}" for name, remote in remotes.items()))
    else:
        yield Finding("dvc", "problem", "no remote: no other machine can rebuild", "dvc remote add --default store URL")


def _configuration(root: Path) -> Iterator[Finding]:
    try:
        params = load_params(root / "params.yaml")
    except ConfigError as error:
        yield Finding("params.yaml", "problem", error.what, error.hint or "")
        return
    yield Finding("params.yaml", "ok", f"{params.name}: {len(params.models) - 1} experts, {len(params.tasks)} tasks")
    if (root / "sources.lock.json").is_file():
        yield Finding("sources.lock.json", "ok", "present")
    else:
        yield Finding("sources.lock.json", "warning", "not pinned yet", "modelweld pin (modelweld run does it too)")


def _disk(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free
    saw = f"{free / 1e9:.0f} GB free"
    if free < LEAST_FREE_BYTES:
        yield Finding("disk", "warning", saw, "free some, or take a bigger disk: a merge needs its own size twice")
    else:
        yield Finding("disk", "ok", saw)


def _registry() -> Iterator[Finding]:
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if address is None:
        yield Finding("registry", "ok", "sqlite in the project (MLFLOW_TRACKING_URI is not set)")
        return
    if not address.startswith(("http://", "https://")):
        yield Finding("registry", "ok", address.split("://", 1)[0])
        return
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=3) as answer:  # noqa: S310
            state: State = "ok" if answer.status == 200 else "problem"
            yield Finding("registry", state, f"answered {answer.status}", "" if state == "ok" else "look at its log")
    except (urllib.error.URLError, TimeoutError) as error:
        yield Finding("registry", "problem", f"no answer: {error}", "start the server, or unset MLFLOW_TRACKING_URI")


def _ask(root: Path, *command: str) -> str | None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None
