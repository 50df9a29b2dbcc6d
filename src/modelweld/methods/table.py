"""The table of methods, for the command `modelweld methods` and for the documents, which hold the same."""

from __future__ import annotations

import re
from typing import Any

from modelweld.methods.method import Method
from modelweld.methods.registry import methods, provenance

_BY = {"elementwise": "entry", "tensor": "tensor", "matrix": "matrix"}
_ARXIV = re.compile(r"^\d{4}\.\d{4,5}$")


def document() -> dict[str, dict[str, Any]]:
    """Every method by name, with what it needs, for machines."""
    return {
        name: {
            "summary": entry.summary,
            "source": entry.source,
            "space": entry.space,
            "shape": entry.shape,
            "models": {"least": entry.models[0], "most": entry.models[1]},
            "weighted": entry.weighted,
            "seeded": entry.seeded,
            "low_rank": entry.low_rank is not None,
            "streamed": entry.streamed,
            **provenance(name),
        }
        for name, entry in methods().items()
    }


def rows() -> list[tuple[str, ...]]:
    """The header, and one row per method: name, what it does, what it merges, models, factors, source."""
    head = ("method", "what it does", "merges", "models", "stays in LoRA factors", "source")
    return [head, *((name, *_row(name, entry)) for name, entry in methods().items())]


def markdown() -> str:
    """The table as the documents hold it."""
    head, *body = rows()
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join((f"`{name}`", *cells)) + " |" for name, *cells in body]
    return "\n".join(lines) + "\n"


def _row(name: str, entry: Method[Any]) -> tuple[str, ...]:
    operands = "task vectors" if entry.needs_base else "weights"
    source = entry.source or ""
    if _ARXIV.match(source):
        source = f"[{source}](https://arxiv.org/abs/{source})"
    package = provenance(name).get("package")
    return (
        entry.summary,
        f"{operands}, by {_BY[entry.shape]}",
        _models(*entry.models),
        "yes" if entry.low_rank else "",
        f"{source} ({package})" if package else source,
    )


def _models(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"
