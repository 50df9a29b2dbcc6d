"""Every MODELWELD_* variable is read in one module, and an empty one counts as not set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import modelweld
from modelweld import settings

SOURCE = Path(modelweld.__file__).parent


def test_no_other_module_reads_the_environment_for_them() -> None:
    reading = re.compile(r"(environ\b|getenv)[^\n]*MODELWELD_")
    found = [path.name for path in SOURCE.rglob("*.py") if reading.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_what_is_not_set_has_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PROJECT_ROOT", "DEVICE", "EXECUTOR", "ACTOR", "CACHE_DIR", "DVC_REPO", "ERROR_FILE"):
        monkeypatch.setenv(getattr(settings, name), "")
    assert settings.project_root(tmp_path) == tmp_path
    assert (settings.devices(), settings.first_device(), settings.executor()) == ("auto", "auto", "local")
    assert (settings.actor(), settings.dvc_repository(), settings.error_file()) == (None, None, None)
    assert settings.cache_directory() == Path.home() / ".cache" / "modelweld"


def test_what_is_set_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(settings.PROJECT_ROOT, str(tmp_path / "project"))
    monkeypatch.setenv(settings.DEVICE, "cuda:1,cuda:2")
    monkeypatch.setenv(settings.CACHE_DIR, str(tmp_path / "cache"))
    assert settings.project_root(tmp_path) == tmp_path / "project"
    assert (settings.devices(), settings.first_device()) == ("cuda:1,cuda:2", "cuda:1")
    assert settings.cache_directory() == tmp_path / "cache"
