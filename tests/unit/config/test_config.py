"""params.yaml and recipes: what is said is checked, what is meant is suggested."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelweld.config import json_schema, load_params, load_recipe
from modelweld.errors import ConfigError

ROOT = Path(__file__).parents[3]


def document(**changes: Any) -> dict[str, Any]:
    return {
        "name": "nightly",
        "models": {"base": {"uri": "base"}, "sst2": {"uri": "hf://org/sst2@main"}},
        "datasets": {"sst2": {"uri": "s3://bucket/sst2"}},
        "tasks": {"sst2": {"model": "sst2", "dataset": "sst2"}},
        "validate": {},
        "merge": {"method": "drm"},
        "baselines": {},
        "evaluate": {},
    } | changes


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_params_fill_in_the_pipelines_paths(tmp_path: Path) -> None:
    params = load_params(written(tmp_path / "params.yaml", document(merge={"method": "ties", "density": 0.3})))
    recipe = params.recipe()
    assert recipe.base == "models/base"
    assert recipe.models is not None
    assert recipe.models["sst2"].path == "models/sst2"
    assert recipe.models["sst2"].task == "sst2"
    assert recipe.parameters().model_dump() == {"method": "ties", "density": 0.3, "scale": 1.0, "disjoint_mean": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"merge": {"method": "drm", "drop_rat": 0.5}}, r"merge.drop_rat: unknown key; did you mean 'drop_rate'\?"),
        ({"merge": {"method": "dmr"}}, r"unknown method .dmr.; did you mean 'drm'\?"),
        ({"merge": {"method": "drm", "drop_rate": 1.0}}, "merge.drop_rate: Input should be less than 1, not 1.0"),
        ({"mrege": {}}, r"mrege: unknown key; did you mean 'merge'\?"),
        ({"models": {"sst2": {"uri": "x"}}}, "models: needs an entry named 'base'"),
        ({"tasks": {"sst2": {"model": "mnli", "dataset": "sst2"}}}, "no expert named 'mnli'"),
        ({"tasks": {"sst2": {"model": "sst2", "dataset": "mnli"}}}, "no dataset named 'mnli'"),
        ({"evaluate": None}, "evaluate: Input should be"),
        ({"name": "../escape"}, "name: .*escape. is no name"),
        ({"baselines": {"flat": {"method": "average", "models": {"mnli": {}}}}}, "baselines.flat.models: no expert"),
    ],
)
def test_a_wrong_document_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_params(written(tmp_path / "params.yaml", document(**changes)))


def test_a_recipe_takes_paths_from_its_own_folder(tmp_path: Path) -> None:
    content = {"method": "average", "models": {"a": {"path": "experts/a"}, "b": {"path": "/elsewhere/b"}}}
    recipe = load_recipe(written(tmp_path / "recipe.yaml", content))
    assert recipe.models is not None
    assert recipe.models["a"].path == str(tmp_path / "experts/a")
    assert recipe.models["b"].path == "/elsewhere/b"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"method": "average"}, "needs `models:`"),
        ({"method": "average", "models": {"a": {"weight": 2.0}}}, "models without a path: a"),
    ],
)
def test_a_recipe_without_paths_is_refused(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(written(tmp_path / "recipe.yaml", content))


def test_missing_and_broken_files_say_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file[\s\S]*modelweld init"):
        load_params(tmp_path / "params.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_params(broken)


def test_the_schema_knows_every_method_and_refuses_unknown_keys() -> None:
    schema = json_schema("recipe")
    methods = set(schema["discriminator"]["mapping"])
    assert {"average", "linear", "task_arithmetic", "ties", "dare", "drm"} <= methods
    assert all(definition.get("additionalProperties") is False for definition in schema["$defs"].values())


def test_every_yaml_of_the_project_says_what_it_is_and_how_to_run_it() -> None:
    # What releases wrote is frozen as it was written.
    files = ("*.yaml", ":!tests/formats")
    listed = subprocess.run(["git", "ls-files", *files], cwd=ROOT, capture_output=True, text=True, check=True)
    shipped = listed.stdout.split()
    assert "dvc.yaml" in shipped
    for path in shipped:
        header = [line for line in (ROOT / path).read_text().splitlines()[:6] if line.startswith("#")]
        assert len(header) >= 2, f"{path} does not begin with what it is and the command that runs it"
