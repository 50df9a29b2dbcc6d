"""Which texts are addresses, which are paths, and where relative paths start."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"^(?:(models):/|([A-Za-z][A-Za-z0-9+.-]*)://)")
_HUB = re.compile(r"^hf://(?:datasets/)?(?P<name>[^@]+)(?:@(?P<revision>.+))?$")


def scheme_of(address: str) -> str | None:
    """The scheme of an address (`hf`, `models`, `s3`, …); None for a path.

    >>> scheme_of("hf://org/name@main"), scheme_of("models:/name@alias"), scheme_of("models/base")
    ('hf', 'models', None)
    """
    found = _SCHEME.match(address)
    return found[1] or found[2] if found else None


def hub_repository(address: str) -> tuple[str, str | None] | None:
    """The Hub's name and the revision in an address of a model or a data set there; None for other addresses.

    >>> hub_repository("hf://org/name@main"), hub_repository("hf://datasets/org/rows"), hub_repository("s3://bucket/a")
    (('org/name', 'main'), ('org/rows', None), None)
    """
    found = _HUB.match(address)
    return (found["name"], found["revision"]) if found else None


def below(root: Path, path: str) -> str:
    """`path` as seen from `root`: `~/` is the home directory; absolute paths and addresses stay.

    >>> below(Path("/project"), "models/base"), below(Path("/project"), "hf://org/name")
    ('/project/models/base', 'hf://org/name')
    """
    return path if scheme_of(path) else str(root / expanded(path))


def expanded(path: str) -> Path:
    """The path with a leading `~/` replaced by the home directory."""
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)
