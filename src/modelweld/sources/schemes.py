"""Which class reads which kind of address: the table of sources, built in and installed.

A package adds a kind of source by an entry point in the group `modelweld.sources`: the name is the scheme, the value a
subclass of `source.Source`. Schemes that are built in cannot be replaced. Whatever is left goes to fsspec.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from modelweld.config.addresses import scheme_of
from modelweld.errors import ConfigError, SourceError
from modelweld.sources.source import Source

GROUP = "modelweld.sources"
_LOCAL = "modelweld.sources.local:LocalPath"
_FSSPEC = "modelweld.sources.url:FsspecUrl"
# Module and class by scheme: each is imported when an address asks for it, since most bring large libraries.
BUILT_IN: Mapping[str | None, str] = {
    None: _LOCAL,
    "file": _LOCAL,
    "local": _LOCAL,
    "hf": "modelweld.sources.hub:HubRepository",
    "dvc": "modelweld.sources.dvc_repo:DvcPath",
    "models": "modelweld.sources.mlflow_models:MlflowModel",
}


def open_source(address: str, project_root: Path, where: str) -> Source:
    """The source at `address`, by its scheme; relative paths are taken from `project_root`."""
    scheme = scheme_of(address)
    if scheme is not None and "::" in address:
        raise SourceError("chained addresses are not sources", where=where, hint="unpack the archive upstream")
    kind = _built_in(BUILT_IN[scheme]) if scheme in BUILT_IN else _installed(str(scheme), where)
    source: Source = kind(address, project_root, where)
    return source


def _built_in(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _installed(scheme: str, where: str) -> Any:
    found = list(entry_points(group=GROUP, name=scheme))
    if not found:
        return _built_in(_FSSPEC)
    if len(found) > 1:
        raise ConfigError(
            f"several installed packages read {scheme}://: {', '.join(map(_package, found))}",
            where=where,
            hint="uninstall all but one",
        )
    kind = found[0].load()
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise ConfigError(
            f"{found[0].value} of {_package(found[0])} is no modelweld.sources.source.Source",
            where=where,
            hint="ask the authors of that package",
        )
    return kind


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
