"""The Prefect server of a run that was given none: it lives exactly as long as the run, also when the run is killed.

Prefect would start one itself, and leave it behind for ever after a kill -9 of the run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelweld.errors import ExternalError
from modelweld.workspace import processes

PAUSE_S = 0.1


@contextmanager
def temporary_server(home: Path, timeout_s: float) -> Iterator[Callable[[], None]]:
    """A server with its database in `home`, named in PREFECT_API_URL at once; what is yielded waits until it is up.

    It raises ExternalError after `timeout_s`. Enter this before Prefect is imported, which reads its settings.
    """
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = home / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    environment = {**os.environ, **processes.TELEMETRY_OFF, "PREFECT_HOME": str(home)}
    url = f"http://127.0.0.1:{port}/api"
    with processes.background_process(command, cwd=home, environment=environment, log=log) as server:
        os.environ["PREFECT_API_URL"] = url
        try:
            yield lambda: _wait(server, url, log, timeout_s)
        finally:
            del os.environ["PREFECT_API_URL"]


def _wait(server: subprocess.Popen[str], url: str, log: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not _answers(url):
        if server.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace").strip()[-1000:]
            raise ExternalError(
                f"Prefect's temporary server did not start: {said}",
                where=str(log),
                hint="run again, or name a standing server in PREFECT_API_URL",
            )
        time.sleep(PAUSE_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:  # noqa: S310 - http on this machine
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
