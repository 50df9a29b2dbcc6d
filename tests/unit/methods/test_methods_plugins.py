"""A method of an installed package is in the schema, the recipe, the plan, the merge, the manifest and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.families import deltas, weights_of, write_family

MODULE = '''
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from modelweld.merging import Method, MethodParameters


class Median(MethodParameters):
    """The entry-wise median of the task vectors."""

    method: Literal["median"] = "median"
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.0


def merge(deltas: Tensor, *, shrinkage: float) -> Tensor:
    return deltas.median(dim=0).values * (1 - shrinkage)


METHOD = Method(Median, merge, summary="entry-wise median", source="2101.00001", shape="elementwise", version="3")
'''
SHAPES = {"layers.0.weight": (6, 5), "layers.0.bias": (6,)}


def install(site: Path, name: str, entry: str, module: str = MODULE, package: str = "modelweld-median") -> Path:
    """A package as pip leaves it: a module, and its metadata with one entry point."""
    site.mkdir(exist_ok=True)
    target = entry.partition(":")[0]
    (site / f"{target}.py").write_text(module)
    info = site / f"{package.replace('-', '_')}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[modelweld.methods]\n{name} = {entry}\n")
    return site


def modelweld(site: Path, *words: str | Path, code: int = 0) -> str:
    """The output of a command whose Python finds what is installed in `site`."""
    path = os.pathsep.join((str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    done = subprocess.run(
        [sys.executable, "-m", "modelweld", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr if code else done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return install(tmp_path / "site", "median", "modelweld_median:METHOD")


def written(root: Path, **asked: object) -> Path:
    models = {f"e{number}": {"path": f"e{number}"} for number in range(3)}
    (root / "recipe.yaml").write_text(yaml.safe_dump({"base": "base", "models": models} | asked))
    return root / "recipe.yaml"


def test_a_merge_by_an_installed_method(site: Path, tmp_path: Path) -> None:
    root = write_family(tmp_path / "models", SHAPES)
    rules = [{"match": {"ndim": 1}, "use": {"method": "task_arithmetic"}}]
    recipe = written(root, method="median", shrinkage=0.25, rules=rules)
    modelweld(site, "merge", recipe, tmp_path / "out")
    merged = weights_of(tmp_path / "out")
    for name, expected in (
        ("layers.0.weight", lambda stack: 0.75 * stack.median(dim=0).values),
        ("layers.0.bias", lambda stack: stack.sum(dim=0)),
    ):
        base, stack = deltas(root, name)
        torch.testing.assert_close(merged[name].double(), base + expected(stack), rtol=1e-5, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["methods"] == {
        "median": {"version": "3", "package": "modelweld-median", "package_version": "0.3"},
        "task_arithmetic": {"version": "1"},
    }
    planned = json.loads(modelweld(site, "plan", recipe, "--json", "--out", tmp_path / "planned"))
    assert {entry["name"]: entry["method"] for entry in planned["tensors"]} == {
        "layers.0.weight": "median",
        "layers.0.bias": "task_arithmetic",
    }


def test_the_schema_and_the_table_have_it(site: Path) -> None:
    for kind in ("recipe", "params"):
        schema = json.loads(modelweld(site, "schema", kind))["$defs"]
        assert schema["Median"]["properties"]["shrinkage"]["maximum"] == 1
        assert schema["MedianRecipe"]["properties"]["method"]["const"] == "median"
    entry = json.loads(modelweld(site, "methods", "--json"))["median"]
    assert (entry["summary"], entry["package"], entry["package_version"]) == (
        "entry-wise median",
        "modelweld-median",
        "0.3",
    )
    assert "(modelweld-median) |" in modelweld(site, "methods", "--markdown")


def test_errors_know_its_name_and_its_parameters(site: Path, tmp_path: Path) -> None:
    for asked, wanted in (
        ({"method": "medain"}, "unknown method 'medain'; did you mean 'median'?"),
        ({"method": "median", "shrinkege": 0.5}, "unknown key; did you mean 'shrinkage'?"),
        ({"method": "median", "shrinkage": 2}, "less than or equal to 1"),
        ({"method": "modelweld_median:METHOD"}, "unknown method 'modelweld_median:METHOD'"),
    ):
        said = modelweld(site, "merge", written(tmp_path, **asked), tmp_path / "out", code=2)
        assert wanted in " ".join(said.split())


def test_without_the_package_its_name_means_nothing(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    said = modelweld(tmp_path / "site", "merge", written(tmp_path, method="median"), tmp_path / "out", code=2)
    assert "unknown method 'median'" in said


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("ties", MODULE, "brings a method 'ties', which modelweld has already"),
        ("median", "import no_such_module\n", "that cannot be loaded: No module named 'no_such_module'"),
        ("median", "METHOD = 3\n", "it has no `parameters`"),
        ("middle", MODULE, 'its parameters do not say `method: Literal["middle"] = "middle"`'),
    ],
)
def test_a_package_that_declares_no_method_of_that_name_is_refused_by_name(
    tmp_path: Path, name: str, module: str, reason: str
) -> None:
    site = install(tmp_path / "site", name, "broken_median:METHOD", module, package="broken-median")
    said = " ".join(modelweld(site, "schema", "recipe", code=2).split())
    assert "the installed package broken-median" in said
    assert reason in said
    assert "pip uninstall broken-median" in said


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "median", "other_median:METHOD", package="other-median")
    said = " ".join(modelweld(site, "schema", "recipe", code=2).split())
    assert "the installed package other-median brings a method 'median', which modelweld-median has already" in said
