"""What modelweld costs around the work itself: the start of each command, a run that does nothing, a first run.

Each row is the median of several starts of one command: seconds by the clock, and seconds of processor time of the
command and of every process that it started, which other work on the machine changes less.

To run: python benchmarks/overhead.py [--repeat 3] [--json]
The projects are made in a folder that is gone afterwards. `toy` has stages that take no time, so that a run of it is
overhead alone; `tiny` merges two models of some 30 thousand weights, so that the start of each stage's process counts
as well. The rows with a server use a Prefect server that was started before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.conftest import build_family, pipeline_params
from tests.support.command import MODELWELD, clean_environment, git
from tests.support.toy import make_toy

SERVER_START_S = 120.0


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the repetitions, in seconds."""

    command: str
    wall_s: float
    processor_s: float


def measure(name: str, where: Path, words: list[str], environment: Mapping[str, str], repeat: int = 1) -> Row:
    """How long `modelweld WORDS` takes in `where`; it must succeed."""
    walls, processors = [], []
    for _ in range(repeat):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([MODELWELD, *words], cwd=where, env=dict(environment), capture_output=True, text=True)
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    row = Row(name, median(walls), median(processors))
    print(f"{row.command:<44} {row.wall_s:7.2f} s  {row.processor_s:7.2f} s", file=sys.stderr, flush=True)
    return row


def make_tiny(root: Path) -> Path:
    """A committed project, as `modelweld init` begins one, that merges two tiny models; its folder."""
    project = root / "tiny"
    family = build_family(root / "family")
    project.mkdir()
    subprocess.run([MODELWELD, "init"], cwd=project, env=clean_environment(), check=True, capture_output=True)
    git(project, "config", "user.email", "ada@example.org")
    git(project, "config", "user.name", "Ada")
    (project / "params.yaml").write_text(pipeline_params(family, validate={}))
    models = {task: {"path": str(family.expert(task))} for task in family.tasks}
    recipe = {"method": "linear", "base": str(family.base), "models": models}
    (project / "recipe.yaml").write_text(json.dumps(recipe))
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "first")
    return project


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[dict[str, str]]:
    """A standing Prefect server; the environment of its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    environment = clean_environment(PREFECT_HOME=str(home), PREFECT_API_URL=url)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SERVER_START_S
        while not _answers(url):
            assert time.monotonic() < end, "the Prefect server did not start"
            time.sleep(0.2)
        yield environment
    finally:
        server.terminate()
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:  # noqa: S310 - the server started above
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def rows(root: Path, repeat: int) -> Iterator[Row]:
    """Every row, in the order in which a project meets the commands."""
    alone = clean_environment()
    toy = make_toy(root / "toy").root
    yield measure("--help", toy, ["--help"], alone, repeat)
    run = ["run", "--frozen", "--no-register"]
    yield measure("run, first, stages that take no time", toy, run, alone)
    yield measure("run, nothing changed, without a server", toy, run, alone, repeat)
    with prefect_server(root / "server") as served:
        yield measure("run, nothing changed, with a server", toy, run, served, repeat)
        other = make_toy(root / "other").root
        yield measure("run, first, stages that take no time, server", other, run, served)
    tiny = make_tiny(root)
    yield measure("plan recipe.yaml", tiny, ["plan", "recipe.yaml"], alone, repeat)
    yield measure("merge recipe.yaml out", tiny, ["merge", "recipe.yaml", str(root / "out")], alone, repeat)
    yield measure("doctor", tiny, ["doctor"], alone, repeat)
    yield measure("pin", tiny, ["pin"], alone, repeat)
    yield measure("stage fetch model-base", tiny, ["stage", "fetch", "model-base"], alone, repeat)
    for folder in ("models", "datasets"):
        subprocess.run(["rm", "-rf", str(tiny / folder)], check=True)
    yield measure("run, first, two tiny models, registered", tiny, ["run"], alone)
    yield measure("run, nothing changed, registered", tiny, ["run"], alone, repeat)
    yield measure("audit 1", tiny, ["audit", "1"], alone, repeat)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="starts of each command that can be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelweld-overhead-") as folder:
        found = list(rows(Path(folder), asked.repeat))
    load = os.getloadavg()[0]
    if asked.json:
        print(json.dumps({"load": load, "rows": [asdict(row) for row in found]}, indent=2))
        return
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f}\n")
    print("| command | clock | processor |\n|---|---|---|")
    for row in found:
        print(f"| `{row.command}` | {row.wall_s:.2f} s | {row.processor_s:.2f} s |")


if __name__ == "__main__":
    main()
