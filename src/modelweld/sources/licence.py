"""The licence that a model card names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from modelweld.errors import SourceError
from modelweld.sources.source import Listed, Source

_CARD_BYTES = 2**20


def card_licence(source: Source, files: Mapping[str, Listed]) -> str | None:
    """The `license:` in the front matter of the source's README.md, or None when there is no such thing."""
    listed = files.get("README.md")
    if listed is None or listed.size_bytes > _CARD_BYTES:
        return None
    from huggingface_hub import ModelCard

    try:
        text = b"".join(source.read("README.md", listed)).decode("utf-8-sig")
        return licence_of(ModelCard(text).data.to_dict())  # type: ignore[no-untyped-call]
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise SourceError(
            f"README.md is not a readable model card: {error}",
            where=source.where,
            hint="fix its front matter, or name the `licence:` in params.yaml",
        ) from error


def licence_of(card: Mapping[str, Any]) -> str | None:
    """The licence in a card's metadata, as one string."""
    named = card.get("license")
    if named == "other":
        named = card.get("license_name") or named
    if isinstance(named, list):
        return ", ".join(str(item) for item in named) or None
    return str(named) if named else None
