"""Numbers in recipes and params.yaml: finite, written as YAML 1.2 has them, and named by the key that holds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelweld.cli.merge import _axis
from modelweld.config import load_params, load_recipe
from modelweld.config.loading import check_recipe
from modelweld.config.mergekit import convert
from modelweld.config.reading import read_yaml
from modelweld.errors import ConfigError
from modelweld.stages.grid import candidates

PARAMS: dict[str, Any] = {
    "name": "nightly",
    "models": {"base": {"uri": "base"}, "a": {"uri": "a"}},
    "datasets": {"a": {"uri": "a"}},
    "tasks": {"a": {"model": "a", "dataset": "a"}},
    "validate": {},
    "merge": {"method": "drm"},
    "baselines": {},
    "evaluate": {},
}


def recipe(text: str) -> Any:
    return check_recipe(read_yaml(text), where="recipe.yaml")


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e400", "'nan'", "inf"])
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("method: linear\nmodels: {a: {path: a, weight: NUMBER}}", "models.a.weight"),
        ("method: task_arithmetic\nscale: NUMBER", "scale"),
        ("method: drm\nrules: [{match: {}, use: base}, {match: {}, use: {method: ties, scale: NUMBER}}]",
         "rules[1].use.scale"),
        ("method: drm\nothers: {method: linear, scale: NUMBER}", "others.scale"),
        ("method: mudsc\nalign: {alpha: NUMBER}", "align.alpha"),
        ("method: mudsc\nalign: {grid: [0.5, NUMBER]}", "align.grid[1]"),
    ],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_by_its_key(text: str, key: str, number: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(text.replace("NUMBER", number))
    assert caught.value.what.startswith(f"{key}: Input should be a finite number")
    assert "; " not in caught.value.what


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"merge": {"method": "drm", "scale": float("nan")}}, "merge.scale"),
        ({"baselines": {"flat": {"method": "ties", "density": float("inf")}}}, "baselines.flat.density"),
        ({"evaluate": {"confidence": float("nan")}}, "evaluate.confidence"),
        ({"validate": {"max_relative_delta": float("inf")}}, "validate.max_relative_delta"),
        ({"register": {"champion_margin": float("-inf")}}, "register.champion_margin"),
        ({"evaluate": {"bootstrap": float("nan")}}, "evaluate.bootstrap"),
    ],
)
def test_params_name_the_key_from_the_top(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS | changes))
    with pytest.raises(ConfigError) as caught:
        load_params(tmp_path / "params.yaml")
    assert caught.value.what.startswith(f"{key}: Input should be a finite number, not")


def test_the_axes_of_a_grid_are_checked_alike() -> None:
    with pytest.raises(ConfigError, match="scale: Input should be a finite number, not nan"):
        candidates(recipe("method: ties\nmodels: {a: {path: a}}"), dict([_axis("scale=1.0,.nan")]))
    with pytest.raises(ConfigError, match="scale: Input should be a valid number, not '12:30'"):
        candidates(recipe("method: ties\nmodels: {a: {path: a}}"), dict([_axis("scale=12:30")]))


def test_mergekits_numbers_are_checked_where_they_stand() -> None:
    models = [{"model": "a", "parameters": {"weight": 1.0, "density": [0.5, float("nan")]}}]
    with pytest.raises(ConfigError) as caught:
        convert({"merge_method": "ties", "base_model": "b", "models": models})
    assert caught.value.where == "models[0].parameters.density[1]"


def test_the_command_says_it_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: linear\nmodels: {a: {path: a, weight: .nan}, b: {path: b}}\n")
    command = [sys.executable, "-m", "modelweld", "merge", "recipe.yaml", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "models.a.weight: Input should be a finite number, not nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # By YAML 1.1 these are 750, 8, 1.0 and false.
        ("method: drm\nscale: 12:30", "scale: Input should be a valid number, not '12:30'"),
        ("method: drm\nscale: 0o10", "scale: Input should be a valid number, not '0o10'"),
        ("method: drm\nscale: yes", "scale: Input should be a valid number, not 'yes'"),
        ("method: drm\nscale: true", "scale: takes neither true nor false"),
        ("method: mudsc\nalign: {grid: [0.5, true]}", "align.grid: takes neither true nor false"),
        ("method: drm\nmodels: {a: {path: a, task: 12}}", "models.a.task: .* write it in quotes, '12'"),
        ("method: drm\nmodels: {SST2: {path: a}}", "models.SST2: 'SST2' is no name: use lowercase letters"),
        ("method: drm\nmodels: {2024: {path: a}}", "models.2024: .* write it in quotes, '2024'"),
    ],
)
def test_what_yaml_1_1_would_misread_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe(text)


def test_what_yaml_1_2_reads_is_read() -> None:
    text = "method: linear\nnormalize: no\nscale: 1e-3\nmodels: {no: {path: 2026-11-25}, b: {path: b, weight: 010}}"
    found = recipe(text + "\noutput: {shard_bytes: 1_000_000}")
    assert (found.normalize, found.scale, found.models["b"].weight) == (False, 1e-3, 10.0)
    assert (found.models["no"].path, found.output.shard_bytes) == ("2026-11-25", 1_000_000)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: drm\nrules: [{match: {}, use: {method: ties, density: 2}}]", r"^rules\[0\].use.density: Input"),
        ("method: drm\nrules: [{match: {}, use: bse}]", r"^rules\[0\].use: .* 'base' or 'skip', not 'bse'$"),
        ("method: mudsc\nalign: {alpha: 2}", "^align.alpha: Input should be less than or equal to 1, not 2$"),
        ("method: mudsc\nalign: {alpha: best}", "^align.alpha: Input should be a number or 'auto', not 'best'$"),
        ("method: drm\ndrm: 5", "^drm: unknown key"),
        ("scale: 1", "^needs `method:`$"),
    ],
)  # fmt: skip
def test_messages_name_the_users_keys_and_no_union_of_types(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(text)
    assert "union" not in caught.value.what
    with pytest.raises(ConfigError, match=says):
        raise ConfigError(caught.value.what)


def test_files_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("method: average\nmodels: {a: {path: a}}\n")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    found = load_recipe(Path("~/recipe.yaml"))
    assert found.models is not None
    assert found.models["a"].path == str(tmp_path / "a")
    assert load_params(Path("~/params.yaml")).name == "nightly"


def test_the_old_name_of_zips_beta_is_read_and_a_mistake_in_it_is_named() -> None:
    found = recipe("method: mudsc\nalign: {mode: zip, inside: 0.7}")
    assert found.align.beta == 0.7
    assert recipe("method: mudsc\nalign: {mode: zip, beta: 0.7}") == found
    with pytest.raises(ConfigError, match=r"align\.inside: Input should be less than or equal to 1"):
        recipe("method: mudsc\nalign: {inside: 2}")
    with pytest.raises(ConfigError, match=r"align\.inside: unknown key"):
        recipe("method: mudsc\nalign: {inside: 0.5, beta: 0.5}")


def test_home_and_addresses_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    text = "method: average\nbase: ~/base\nmodels: {a: {path: a}, b: {path: 'hf://org/b@main'}, c: {path: /c}}\n"
    (tmp_path / "recipe.yaml").write_text(text + "align: {spec: ~/spec.json, calibration: {a: {dataset: rows}}}\n")
    found = load_recipe(tmp_path / "recipe.yaml")
    assert found.base == "/home/ada/base"
    assert [entry.path for entry in (found.models or {}).values()] == [str(tmp_path / "a"), "hf://org/b@main", "/c"]
    assert found.align is not None
    assert found.align.spec == "/home/ada/spec.json"
    assert found.align.calibration is not None
    assert found.align.calibration["a"].dataset == str(tmp_path / "rows")
