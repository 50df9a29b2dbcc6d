"""The documentation builds without a warning, shows what the code declares, and loads nothing from the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelweld.cli.app import COMMANDS
from modelweld.config import json_schema
from modelweld.config.methods import METHODS
from modelweld.formats import DOCUMENTS

pytest.importorskip("mkdocs", reason="the docs extra is not installed: pip install 'modelweld[docs]'")

ROOT = Path(__file__).parents[2]
# What a browser would fetch by itself; links that a reader may follow are no part of it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(\w+:[^"]*)"""
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def page(site: Path, address: str) -> str:
    return (site / address / "index.html").read_text(encoding="utf-8")


def test_every_command_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/commands")
    assert [name for name in COMMANDS if f"<code>modelweld {name}</code>" not in text] == []
    assert "OUT/&lt;key&gt;/" in text  # and no placeholder of a help text is lost as an HTML tag


def test_every_method_is_in_the_reference(site: Path) -> None:
    text = page(site, "reference/methods")
    names = [kind.model_fields["method"].default for kind in METHODS]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "drop_rate" in text


def test_every_key_of_params_and_recipes_is_in_the_reference(site: Path) -> None:
    for kind in ("params", "recipe"):
        schema = json.loads((site / f"reference/schemas/{kind}.json").read_text(encoding="utf-8"))
        assert schema == json_schema(kind)
    assert [
        key for key in json_schema()["properties"] if f"<code>{key}</code>" not in page(site, "reference/params")
    ] == []


def test_every_document_is_in_the_reference(site: Path) -> None:
    for name in DOCUMENTS:
        schema = json.loads((site / f"reference/schemas/{name}.json").read_text(encoding="utf-8"))
        text = page(site, f"reference/documents/{name}")
        assert [key for key in schema["properties"] if f"<code>{key}</code>" not in text] == []


def test_exported_functions_are_in_the_reference(site: Path) -> None:
    shown = page(site, "reference/api/modelweld") + page(site, "reference/api/symmetry")
    for name in ("modelweld.merge", "modelweld.load", "modelweld.plan", "modelweld.symmetry.align"):
        assert f'id="{name}"' in shown
    assert 'id="modelweld.methods.drm.merge"' in page(site, "reference/api/merging")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    found = {
        str(path.relative_to(site)): sorted(set(LOADED.findall(path.read_text(encoding="utf-8"))))
        for path in site.rglob("*.html")
    }
    assert {path: addresses for path, addresses in found.items() if addresses} == {}


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[nowhere](nowhere.md) and [no heading](#none)\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("\nnav:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: broken\n{validation}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "#none" in done.stderr
