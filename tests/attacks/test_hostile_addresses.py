"""Addresses that hold secrets, and YAML that is made to hurt: refused before anything is written or printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modelweld.config import Params, load_params, load_recipe
from modelweld.errors import ConfigError, SourceError
from modelweld.sources import LOCK_NAME, pin
from modelweld.sources.refusals import first_line, refuse_secrets

SECRET = "s3cr3ts3cr3ts3cr3ts3cr3t"
WITH_SECRETS = [
    f"http://{SECRET}@host/model",
    f"https://user:{SECRET}@host/model",
    f"https://user:{SECRET}/more@host/model",
    f"https://user%3A{SECRET}%40host/model",
    f"https://host/model?auth={SECRET}",
    f"https://host/model?pwd={SECRET}",
    f"https://host/model?jwt={SECRET}",
    f"https://host/model?x=1;oauth_token={SECRET}",
    f"https://host/model#access_token={SECRET}",
    f"https://host/model?X-Amz-Signature={SECRET}",
    f"dvc://https://{SECRET}@github.com/org/repo@main:models/a",
    f"https://host/ghp_{SECRET}/model",
    f"https://host/github_pat_{SECRET}/model",
    f"hf://org/name@hf_{SECRET}",
    f"https://host/eyJ{SECRET}.{SECRET}.x/model",
]
WITHOUT = [
    "http://host/model",
    "https://host:8080/@scope/model?author=ada&keyword=x&authority=y",
    "ssh://git@host/repo",
    "dvc://git@github.com:org/repo@v1:models/a",
    "dvc://https://github.com/org/repo@v1:models/a",
    "abfs://container@account.dfs.core.windows.net/model",
    "s3://bucket/key@2/model",
    "models:/name@champion",
    "data/a#b?c",
]


def params(uri: str) -> dict[str, object]:
    return {
        "name": "demo",
        "models": {"base": {"uri": uri}},
        "datasets": {},
        "tasks": {},
        "validate": {},
        "merge": {"method": "average"},
        "baselines": {},
        "evaluate": {},
    }


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_a_secret_is_neither_pinned_nor_repeated(tmp_path: Path, uri: str) -> None:
    with pytest.raises(SourceError) as caught:
        pin(Params.model_validate(params(uri)), tmp_path)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("uri", WITHOUT)
def test_addresses_without_secrets_pass(uri: str) -> None:
    refuse_secrets(uri, "models.base.uri")


@pytest.mark.parametrize("command", [["pin"], ["plan", "params.yaml"]])
def test_the_commands_do_not_print_it(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params(f"http://{SECRET}@host/model")))
    arguments = [sys.executable, "-m", "modelweld", *command]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr
    assert "credentials inside an address" in done.stderr


@pytest.mark.parametrize(
    "message",
    [
        f"403, message='Forbidden', url='https://bucket/x?X-Amz-Signature={SECRET}&y=1'",
        f"unable to access 'https://{SECRET}@github.com/org/repo'",
        f"no such repository: ghp_{SECRET}",
    ],
)
def test_what_other_libraries_say_is_repeated_without_secrets(message: str) -> None:
    said = first_line(ValueError(message))
    assert SECRET not in said
    assert said.split()[0] == message.split()[0]


@pytest.mark.parametrize("deep", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000])
def test_yaml_nested_without_end_is_refused(tmp_path: Path, deep: str) -> None:
    (tmp_path / "params.yaml").write_text(deep)
    for load in (load_params, load_recipe):
        with pytest.raises(ConfigError, match="not valid YAML: nested too deeply"):
            load(tmp_path / "params.yaml")


def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"method: average\nscale: {'9' * 5000}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")
