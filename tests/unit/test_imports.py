"""Importing modelweld and asking for help must stay light: the heavy libraries open on first use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "mlflow", "prefect", "great_expectations", "transformers", "datasets", "pandas", "dvc", "peft")
PROBE = """
import sys
sys.argv = ["modelweld", *{arguments!r}]
{code}
print("loaded:", sorted(name for name in {heavy!r} if name in sys.modules))
"""
COMMAND = "from modelweld.cli import main\ntry:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code"


def loaded_by(code: str, *arguments: str, where: Path | None = None) -> str:
    script = PROBE.format(arguments=list(arguments), code=code, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, cwd=where
    )
    return done.stdout.splitlines()[-1]


def modules_of(code: str, *arguments: str, where: Path | None = None) -> set[str]:
    """Every module below modelweld.cli that is loaded after `code`."""
    wanted = 'print(*(name for name in sys.modules if name.startswith("modelweld.cli.")))'
    script = f"import sys\nsys.argv = ['modelweld', *{list(arguments)!r}]\n{code}\n{wanted}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, cwd=where
    )
    return {name.removeprefix("modelweld.cli.") for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("name", ["modelweld", "modelweld.formats"])
def test_import_loads_nothing_heavy(name: str) -> None:
    assert loaded_by(f"import {name}") == "loaded: []"


@pytest.mark.parametrize("arguments", [["--help"], ["stage", "--help"], ["merge", "--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(COMMAND, *arguments) == "loaded: []"


def test_a_command_imports_no_other_commands_module() -> None:
    assert modules_of(COMMAND, "--json", "stage", "--help") == {"app", "stage"}
    assert {"app", "merge", "registry", "symmetry"} < modules_of(COMMAND, "--help")


def test_every_command_is_in_the_table() -> None:
    script = """
import importlib
from modelweld.cli.app import COMMANDS, app
for module in dict.fromkeys(COMMANDS.values()):
    importlib.import_module(f"modelweld.cli.{module}")
found = {info.name or info.callback.__name__: info.callback.__module__ for info in app.registered_commands}
found |= {info.name: "modelweld.cli.stage" for info in app.registered_groups}
assert found == {name: f"modelweld.cli.{module}" for name, module in COMMANDS.items()}, found
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    """A folder with one pinned local model."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    params = {
        "name": "tiny",
        "models": {"base": {"uri": "source"}},
        "datasets": {},
        "tasks": {},
        "merge": {"method": "average"},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    entry = {"kind": "model", "name": "base", "uri": "source", "resolved": "source", "revision": None, "licence": None}
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    files = {"config.json": {"sha256": digest, "size_bytes": 2}}
    lock = {"version": 1, "pinned": {"model-base": {**entry, "path": "models/base", "files": files}}}
    (tmp_path / "sources.lock.json").write_text(json.dumps(lock))
    return tmp_path


def test_fetching_a_local_source_loads_nothing_heavy(pinned: Path) -> None:
    assert loaded_by(COMMAND, "stage", "fetch", "model-base", where=pinned) == "loaded: []"
    assert (pinned / "models" / "base" / "config.json").read_text() == "{}"


def test_an_elementwise_merge_needs_torch_alone(tmp_path: Path) -> None:
    from tests.support.plain import write_checkpoint

    models = {name: {"path": str(write_checkpoint(tmp_path / name, seed))} for seed, name in enumerate("ab")}
    base = str(write_checkpoint(tmp_path / "base", 7))
    recipe = {"method": "task_arithmetic", "base": base, "models": models}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert loaded_by(COMMAND, "merge", "recipe.yaml", "out", where=tmp_path) == "loaded: ['torch']"
    assert loaded_by(COMMAND, "plan", "recipe.yaml", where=tmp_path) == "loaded: ['torch']"
