"""A throw-away project: the real dvc.yaml with commands that take no time, over real git and DVC.

A stage can be told to fail, to wait or to leave a mark, by files in the project's `orders/` folder, which no stage
depends on: `orders/<stage>.exit` holds the exit codes of its next attempts, `orders/<stage>.sleep` seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.manifests import manifest_of

SHIPPED_GRAPH = Path(__file__).parents[2] / "dvc.yaml"

STAGE = """\
import hashlib, json, os, pathlib, sys, time

kind, *rest = sys.argv[1:]
name = "@".join([kind, *rest])
home = pathlib.Path(os.environ.get("MODELWELD_PROJECT_ROOT", "."))


def digest(*names):
    total = hashlib.sha256()
    for path in sorted(p for n in names for p in pathlib.Path(n).rglob("*") if p.is_file()):
        total.update(path.as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def write(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1, sort_keys=True))


print(f"at work on {name}", flush=True)
with (home / "orders" / "ran.txt").open("a") as log:
    log.write(name + "\\n")
wait = home / "orders" / f"{name}.sleep"
if wait.exists():
    time.sleep(float(wait.read_text()))
order = home / "orders" / f"{name}.exit"
codes = order.read_text().split() if order.exists() else []
if codes:
    order.write_text(" ".join(codes[1:]))
    if codes[0] != "0":
        kind = {"1": "GateRefused", "2": "CheckpointError", "3": "DiskFull"}.get(codes[0], "ModelweldError")
        error = {"error": kind, "what": f"{name} was told to fail", "where": "models/a", "hint": "take the order away"}
        if "MODELWELD_ERROR_FILE" in os.environ and not (home / "orders" / "unreported").exists():
            write(os.environ["MODELWELD_ERROR_FILE"], {"schema": "modelweld.stage_error/1", **error})
        print(f"{name} was told to fail", file=sys.stderr)
        if int(codes[0]) < 0:
            os.kill(os.getpid(), -int(codes[0]))
        sys.exit(int(codes[0]))

if kind == "fetch":
    pin = json.load(open("sources.lock.json"))["pinned"][rest[0]]
    write(pin["path"] + "/weights.txt", (pin["revision"] + "\\n") * 1000)
elif kind == "validate":
    of = {"subject": "models", "expectation": "of", "observed": digest("models"), "where": None, "hint": None}
    results = [{"critical": True, "success": True, **of}]
    write("validation/gate.json", {"version": 2, "verdict": "pass", "results": results})
elif kind == "merge":
    # Another machine may round otherwise.
    write("merged/weights.txt", digest("models", "validation") + os.environ.get("TOY_ROUNDING", ""))
    write("merged/manifest.json", {**MANIFEST, "output": {"model_digest": digest("models"), "files": {}}})
elif kind == "baselines":
    write("baselines/average/weights.txt", digest("models"))
elif kind == "evaluate":
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    test = {"only_this": 0, "only_expert": 0, "p_value": 1.0}
    score = {"accuracy": interval, "macro_f1": interval, "normalised": 0.9, "model_digest": digest("merged")}
    score |= {"normalised_interval": {"low": 0.8, "high": 1.0}, "versus_expert": test}
    systems = {"base": score, "expert": score, "merged": score, "average": score}
    of = {"dataset_digest": "d", "rows": 2, "metric": "accuracy", "confidence": 0.95, "bootstrap": 0}
    write(f"scores/{rest[0]}.json", {"version": 1, "task": rest[0], "systems": systems, **of})
    write(f"predictions/{rest[0]}.parquet", digest("merged", "baselines"))
"""

IGNORED = (
    "/models/\n/datasets/\n/merged/\n/baselines/\n/predictions/\n/validation/\n/scores/\n/sources.lock.json\n/orders/\n"
)


@dataclass(frozen=True)
class Toy:
    """A project at `root` whose DVC remote is `remote`."""

    root: Path
    remote: Path

    def git(self, *words: str) -> str:
        return run(self.root, "git", *words)

    def dvc(self, *words: str) -> str:
        return run(self.root, sys.executable, "-m", "dvc", *words)

    def commit(self, message: str = "change") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def params(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return loaded

    def change_params(self, **sections: Any) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params() | sections))

    def pin(self, **revisions: str) -> None:
        """Write sources.lock.json as if every source had been found at `<name>-1`, or at the revision named here."""
        pinned: dict[str, object] = {}
        for kind, names in (("model", ["base", "a", "b"]), ("dataset", ["a", "b"])):
            for name in names:
                key = f"{kind}-{name}"
                revision = revisions.get(key.replace("-", "_"), f"{name}-1")
                pinned[key] = {
                    "kind": kind,
                    "name": name,
                    "uri": f"sources/{name}",
                    "resolved": f"sources/{name}",
                    "revision": revision,
                    "licence": None,
                    "path": f"{kind}s/{name}",
                    "files": {},
                }
        document = {"version": 1, "pinned": pinned}
        (self.root / "sources.lock.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")

    def order(self, stage: str, what: str, content: str) -> None:
        (self.root / "orders" / f"{stage}.{what}").write_text(content)

    def ran(self) -> list[str]:
        """The stages that really ran since the last call."""
        log = self.root / "orders" / "ran.txt"
        lines = log.read_text().split() if log.exists() else []
        log.write_text("")
        return lines


def run(where: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """A process environment in which the stage's `python` is this one."""
    here = os.path.dirname(sys.executable)
    return {**os.environ, "PATH": os.pathsep.join([here, os.environ["PATH"]]), "OMP_NUM_THREADS": "1", **more}


def make_toy(root: Path, *, below: str = "") -> Toy:
    """A committed project without a run; in the folder `below` of its repository when that is given."""
    shutil.copytree(_prepared(below), root, symlinks=True)
    project = root / below
    remote = root.parent / f"{root.name}-remote"
    settings = project / ".dvc" / "config"
    settings.write_text(settings.read_text().replace(f"../{REMOTE}", os.path.relpath(remote, project / ".dvc")))
    toy = Toy(project, remote)
    toy.pin()
    toy.commit("first")
    return toy


REMOTE = "the-remote-of-the-copy"


@functools.cache
def _prepared(below: str) -> Path:
    """What every toy is copied from: git and DVC are asked once, since a process of DVC takes over a second."""
    root = Path(tempfile.mkdtemp(prefix="toy-")) / "project"
    atexit.register(shutil.rmtree, root.parent, ignore_errors=True)
    project = root / below
    project.mkdir(parents=True)
    run(root, "git", "init", "--quiet", "--initial-branch=main")
    run(root, "git", "config", "user.email", "ada@example.org")
    run(root, "git", "config", "user.name", "Ada")
    dvc = (sys.executable, "-m", "dvc")
    run(project, *dvc, "init", "--quiet", *(["--subdir"] if below else []))
    run(project, *dvc, "remote", "add", "--quiet", "--default", "store", REMOTE)
    run(project, *dvc, "config", "cache.type", "reflink,hardlink,symlink,copy")
    (project / "dvc.yaml").write_text(SHIPPED_GRAPH.read_text().replace("modelweld stage", "python toy_stage.py"))
    (project / "toy_stage.py").write_text(STAGE.replace("MANIFEST", repr(manifest_of().data())))
    (project / ".gitignore").write_text(IGNORED)
    (project / "orders").mkdir()
    (project / "expectations").mkdir()
    (project / "expectations" / "README.md").write_text("None of its own.")
    params = {
        "name": "toy",
        "models": {name: {"uri": f"sources/{name}"} for name in ("base", "a", "b")},
        "datasets": {name: {"uri": f"sources/data-{name}"} for name in ("a", "b")},
        "tasks": {name: {"model": name, "dataset": name} for name in ("a", "b")},
        "validate": {"min_rows": 1},
        "merge": {"method": "average"},
        "baselines": {"average": {"method": "average"}},
        "evaluate": {"bootstrap": 0},
    }
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    return root
