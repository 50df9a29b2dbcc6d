"""The table of sources: which class reads an address, and how an installed package adds one."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelweld.config import Params
from modelweld.errors import ConfigError, SourceError
from modelweld.sources import fetch, pin
from modelweld.sources.local import LocalPath
from modelweld.sources.schemes import open_source

# What somebody else's package would hold.
TOY = """
from modelweld.sources.source import Listed, Listing, Source

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


class Toy(Source):
    def resolve(self):
        return Listing(self.address, "1", {name: Listed(len(content)) for name, content in FILES.items()})

    def read(self, name, listed, offset=0):
        yield FILES[name][offset:]


class NoSource:
    pass
"""


def install(site: Path, entry_points: dict[str, str], name: str = "toy") -> None:
    (site / f"{name}_source.py").write_text(TOY)
    info = site / f"{name}_source-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-source\nVersion: 1.0\n")
    lines = [f"{scheme} = {value}" for scheme, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[modelweld.sources]", *lines, ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_an_installed_package_adds_a_kind_of_source(site: Path, tmp_path: Path) -> None:
    install(site, {"toy": "toy_source:Toy", "file": "toy_source:Toy"})
    params = Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": "toy://anything"}},
            "datasets": {},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )
    entry = pin(params, tmp_path).pinned["model-base"]
    assert (entry.resolved, entry.revision) == ("toy://anything", "1")
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == b"weights"
    # What is built in cannot be replaced.
    assert isinstance(open_source(f"file://{tmp_path}", tmp_path, "models.base.uri"), LocalPath)


def test_a_package_that_cannot_be_used_is_named(site: Path, tmp_path: Path) -> None:
    install(site, {"broken": "toy_source:NoSource", "two": "toy_source:Toy"})
    with pytest.raises(ConfigError, match="toy_source:NoSource of toy-source is no"):
        open_source("broken://x", tmp_path, "models.base.uri")
    install(site, {"two": "other_source:Toy"}, name="other")
    with pytest.raises(ConfigError, match=r"several installed packages read two://: .*toy-source"):
        open_source("two://x", tmp_path, "models.base.uri")


def test_paths_and_chained_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/model").mkdir(parents=True)
    for address in ("~/model", "home/model", f"file://{tmp_path}/home/model"):
        assert open_source(address, tmp_path, "models.base.uri").directory == tmp_path / "home/model"
    with pytest.raises(SourceError, match="chained addresses"):
        open_source("zip://a::https://host/b.zip", tmp_path, "models.base.uri")
