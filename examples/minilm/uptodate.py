"""What is made already: each product's key is a digest of its settings, its code and the keys of what it is made from.

made.json holds the key that each product was made under. A product is made again when its key is another or its folder
is missing. Keys chain: another seed of the texts changes the keys of the texts and of every expert, not of the base.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def key_of(code: Path, settings: Any, *upstream: str) -> str:
    """The key of what `code` makes by `settings` from the products with the keys `upstream`."""
    hasher = hashlib.sha256(code.read_bytes())
    hasher.update(json.dumps([settings, upstream], sort_keys=True).encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Made:
    """The products in one folder, and the keys they were made under."""

    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "made.json"

    def _read(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        if self._file.is_file():
            found = json.loads(self._file.read_text(encoding="utf-8"))
        return found

    def has(self, product: str, key: str) -> bool:
        """Whether the folder `product` is there, made under this key."""
        return self._read().get(product, {}).get("key") == key and (self.folder / product).is_dir()

    def facts(self, product: str) -> dict[str, Any]:
        """What was noted when it was made."""
        facts: dict[str, Any] = self._read()[product]["facts"]
        return facts

    def note(self, product: str, key: str, facts: dict[str, Any] | None = None) -> None:
        """Note that the folder `product` was completed under this key."""
        document = self._read() | {product: {"key": key, "facts": facts or {}}}
        staging = self._file.with_suffix(".part")
        staging.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(staging, self._file)
