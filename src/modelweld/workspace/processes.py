"""Child processes that stream their lines, keep to a time limit and never outlive their parent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelweld import settings

SUPERVISOR = Path(__file__).with_name("supervisor.py")
GRACE_S = 10.0
KEPT_LINES = 400
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
# Colours and cursor movements of a stage's progress bars have no place in a log.
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")

LineCallback = Callable[[str], None]


@dataclass(frozen=True)
class ProcessResult:
    """How a child ended: its exit code, whether its time was up, and its last lines."""

    code: int
    timed_out: bool
    lines: tuple[str, ...]


def environment(project_root: Path) -> dict[str, str]:
    """What a stage's process sees: this interpreter first on PATH, the project's root, the registry, no telemetry."""
    here = os.path.dirname(sys.executable)
    ours = {
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
        settings.PROJECT_ROOT: str(project_root),
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{project_root / 'mlflow.db'}"),
        # Threads that wait by spinning take a fifth to a half of the processor from those that work.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "0"),
        # Lines must reach the log when they are printed, not when a buffer is full.
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **TELEMETRY_OFF, **ours}


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    on_line: LineCallback | None = None,
    timeout_s: float | None = None,
) -> ProcessResult:
    """How `command` ended, after every line it printed was given to `on_line`.

    The child's process group ends with this process (also by kill -9), with an exception raised here (Ctrl-C), and when
    `timeout_s` are over.
    """
    words = [sys.executable, "-I", "-S", str(SUPERVISOR), str(GRACE_S), *command]
    child = subprocess.Popen(  # noqa: S603 - no shell; the words come from dvc.yaml's own graph
        words,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert child.stdin is not None  # noqa: S101 - asked for above
    assert child.stdout is not None  # noqa: S101
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        _close(child)

    timer = threading.Timer(timeout_s, stop) if timeout_s is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        for raw in child.stdout:
            line = ESCAPES.sub("", raw).rstrip()
            if line:
                kept.append(line)
                if on_line:
                    on_line(line)
        code = child.wait()
    finally:
        if timer:
            timer.cancel()
        _close(child)
        child.wait()
        child.stdout.close()
    return ProcessResult(code, timed_out.is_set(), tuple(kept))


@contextmanager
def background_process(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path, grace_s: float = GRACE_S
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs while the block does and writes to `log`; it too ends with this one, however that ends."""
    with log.open("wb") as sink:
        child = subprocess.Popen(  # noqa: S603 - no shell, words of the caller's own
            [sys.executable, "-I", "-S", str(SUPERVISOR), str(grace_s), *command],
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    try:
        yield child
    finally:
        _close(child)
        child.wait()


def _close(child: subprocess.Popen[str]) -> None:
    if child.stdin and not child.stdin.closed:
        child.stdin.close()
