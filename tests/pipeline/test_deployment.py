"""prefect.yaml on a real server: its schedule makes runs, and a run started by hand is done by a worker."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelweld.workspace import Project
from tests.conftest import build_family, pipeline_params
from tests.support.toy import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
SHIPPED = Path(__file__).parents[2] / "prefect.yaml"


@dataclass
class Server:
    """A Prefect server with a home of its own, and the environment of its clients."""

    variables: dict[str, str]
    folder: Path

    def client(self, *words: str, where: Path) -> str:
        done = subprocess.run(
            [str(BIN / "prefect"), *words], cwd=where, env=self.variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """The records of one kind that the server holds: what its pages show, without a table's width."""
        request = urllib.request.Request(  # noqa: S310 - the server this test started
            f"{self.variables['PREFECT_API_URL']}/{kind}/filter",
            data=json.dumps(wanted).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            found: list[dict[str, Any]] = json.load(reply)
        return found

    def start(self, *words: str, where: Path) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{words[0]}.log").open("wb")
        with log:
            return subprocess.Popen(
                [str(BIN / "prefect"), *words], cwd=where, env=self.variables, stdout=log, stderr=subprocess.STDOUT
            )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    variables = environment(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_API_URL=url)
    variables.pop("MLFLOW_TRACKING_URI", None)
    started = Server(variables, tmp_path)
    process = started.start("server", "start", "--host", "127.0.0.1", "--port", str(port), where=tmp_path)
    try:
        wait_for(lambda: answers(f"{url}/health"), 120)
        yield started
    finally:
        stop(process)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    family = build_family(tmp_path / "family")
    root = tmp_path / "project"
    root.mkdir()
    for words in (["modelweld", "init"], ["git", "config", "user.email", "a@b.c"], ["git", "config", "user.name", "a"]):
        subprocess.run(words, cwd=root, env=environment(), check=True, capture_output=True)
    (root / "params.yaml").write_text(pipeline_params(family, validate={}))
    shutil.copy(SHIPPED, root)
    subprocess.run(["git", "add", "--all"], cwd=root, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "first"], cwd=root, check=True)
    return root


def test_the_nightly_deployment(server: Server, project: Path) -> None:
    server.client("work-pool", "create", "merges", "--type", "process", where=project)
    server.client("--no-prompt", "deploy", "--all", where=project)
    # sqlalchemy 2.1 breaks exactly this, without a word: see pyproject.toml.
    scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}}
    wait_for(lambda: any(run["auto_scheduled"] for run in server.ask("flow_runs", flow_runs=scheduled)), 150)

    worker = server.start("worker", "start", "--pool", "merges", where=project)
    try:
        said = server.client("deployment", "run", "merge/nightly", "--watch", where=project)
        assert "finished successfully" in said, said + (server.folder / "worker.log").read_text()
    finally:
        stop(worker)
    (record,) = Project.find(project).records("tiny")
    assert record.flow_run_id
    assert Project.find(project).unfinished() == []
    assert (project / "mlflow.db").exists()
    assert {"scores-tiny", "version-tiny"} <= {artifact["key"] for artifact in server.ask("artifacts")}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - the server this test started
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(1)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
