"""How a path that somebody wrote becomes one that can be opened."""

from __future__ import annotations

import re
from pathlib import Path

_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")


def below(root: Path, path: str) -> str:
    """`path` as seen from `root`: `~/` is the home directory, absolute paths and addresses (`hf://…`) stay."""
    if _ADDRESS.match(path):
        return path
    return str(root / (Path(path).expanduser() if path == "~" or path.startswith("~/") else path))
