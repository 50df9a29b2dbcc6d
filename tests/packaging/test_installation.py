"""The wheel in a fresh virtual environment: what merging needs is installed with it, the rest is named by its extra.

The environment holds exactly the distributions that the wheel's metadata asks for, linked from the ones that the tests
run with: an import of anything else fails there as it would for a user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.families import write_family
from tests.support.toy import make_toy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(ROOT)], check=True)
    (built,) = out.glob("*.whl")
    return built


def required(root: Distribution, extra: str) -> list[Distribution]:
    """The installed distributions that `root` with this extra depends on, directly or not, each once."""
    found: dict[str, Distribution] = {}
    known: dict[str, set[str]] = {}
    waiting = [(root, {extra})]
    while waiting:
        at, extras = waiting.pop()
        for line in at.requires or ():
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": name}) for name in ("", *extras)):
                continue
            key = canonicalize_name(wanted.name)
            itself = key == canonicalize_name(root.metadata["Name"])
            if key in known and wanted.extras <= known[key]:
                continue
            known.setdefault(key, set()).update(wanted.extras)
            if not itself:
                found[key] = distribution(wanted.name)
            waiting.append((root if itself else found[key], known[key]))
    return list(found.values())


def environment_of(where: Path, wheel: Path, extra: str = "") -> Path:
    """The `bin` folder of a new virtual environment with the wheel and what it requires."""
    venv.create(where, with_pip=False)
    (site,) = where.glob("lib/python*/site-packages")
    (root,) = distributions(path=[str(wheel)])
    for found in required(root, extra):
        tops = {file.parts[0] for file in found.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = where / "bin" / "modelweld"
    script.write_text(f"#!{where / 'bin' / 'python'}\nfrom modelweld.cli import main\nmain()\n")
    script.chmod(0o755)
    return where / "bin"


def run(binaries: Path, *words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = os.pathsep.join([str(binaries), clean["PATH"]])
    command = [str(binaries / "modelweld"), *words]
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without extras."""
    return environment_of(tmp_path_factory.mktemp("bare") / "venv", wheel)


def test_the_wheel_installs_modelweld_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"modelweld"}
    assert "modelweld/flows/merge.py" in zipfile.ZipFile(wheel).namelist()


def test_without_extras_models_are_planned_merged_and_exported(bare: Path, tmp_path: Path) -> None:
    root = write_family(tmp_path / "family", experts=2)
    models = {f"e{i}": {"path": str(root / f"e{i}")} for i in range(2)}
    recipe = {"method": "drm", "base": str(root / "base"), "models": models}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run(bare, "plan", "recipe.yaml", cwd=tmp_path)
    run(bare, "merge", "recipe.yaml", "merged", cwd=tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    run(bare, "export", "--model", "merged", "plain", cwd=tmp_path)
    assert (tmp_path / "plain" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["run --frozen", "audit champion", "symmetry ../MODEL"])
def test_a_command_that_needs_an_extra_says_which(bare: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text('{"model_type": "bert"}')
    toy = make_toy(tmp_path / "project")
    said = run(bare, *command.split(), cwd=toy.root, code=2).stderr
    assert "pip install 'modelweld[" in said
    assert "Traceback" not in said


def test_with_the_pipeline_extra_a_project_is_begun_and_examined(wheel: Path, tmp_path: Path) -> None:
    binaries = environment_of(tmp_path / "venv", wheel, "pipeline")
    project = tmp_path / "project"
    project.mkdir()
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    run(binaries, "init", cwd=project)
    found = run(binaries, "--json", "doctor", cwd=project, code=1).stdout
    # A new project has no sources yet: that is the only complaint.
    problems = {item["check"] for item in json.loads(found) if item["state"] == "problem"}
    assert not {name for name in problems if name.startswith("package")}, found
