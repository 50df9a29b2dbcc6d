"""A checkpoint as tables: its tensors, and one row that compares it with its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas

from modelweld.validation.fingerprint import Tokenizing, config_differences
from modelweld.validation.inventory import Inventory
from modelweld.validation.tables import Table

__all__ = ["Subject", "checkpoint_tables", "identical_models"]


@dataclass(frozen=True)
class Subject:
    """What was read of one model. `labels` are its head's classes, None when no task uses its head.

    `other_base` is the base that an adapter names when that is not this project's, `folded_rank` the rank of the
    adapter that a half-precision model seems to be.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    tokenizing: Tokenizing
    inventory: Inventory
    labels: tuple[str, ...] | None = None
    other_base: str | None = None
    folded_rank: int | None = None


def identical_models(experts: Mapping[str, Inventory]) -> dict[str, str]:
    """For every expert whose backbone another has too, the names of the others."""
    owners: dict[str, list[str]] = {}
    for name, inventory in sorted(experts.items()):
        if inventory.backbone is not None:
            owners.setdefault(inventory.backbone, []).append(name)
    return {
        name: ", ".join(other for other in names if other != name)
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def checkpoint_tables(
    model: Subject, base: Subject | None, twin: str | None = None, max_relative_delta: float = float("inf")
) -> list[Table]:
    """The `checkpoint` and `tensors` tables of a model; `base` is None for the base itself."""
    subject, inventory = f"model:{model.name}", model.inventory
    parameters = {"max_relative_delta": max_relative_delta}
    row = {
        "path": model.path,
        "model_type": model.config.get("model_type"),
        "base_model_type": base and base.config.get("model_type"),
        "config_differences": config_differences(model.config, base.config) if base else "",
        "vocab_size": model.config.get("vocab_size"),
        "base_vocab_size": base and base.config.get("vocab_size"),
        "vocabulary": model.tokenizing.vocabulary,
        "base_vocabulary": base and base.tokenizing.vocabulary,
        "tokenizer_cuts": model.tokenizing.cuts,
        "base_tokenizer_cuts": base and base.tokenizing.cuts,
        "highest_token": model.tokenizing.highest_token,
        "parameters": inventory.parameters,
        "relative_delta": inventory.relative_delta,
        "changed_share": inventory.changed_share,
        "twin": twin,
        "other_base": model.other_base,
        "folded_rank": model.folded_rank,
        "head_rows": _head_rows(inventory, model.labels),
        "head_labels": None if model.labels is None else len(model.labels),
    }
    return [
        Table("checkpoint", subject, model.path, pandas.DataFrame([row]), key="path", parameters=parameters),
        Table("tensors", subject, model.path, inventory.frame, key="name", row="tensor", parameters=parameters),
    ]


def _head_rows(inventory: Inventory, labels: tuple[str, ...] | None) -> int | None:
    """How many classes the head's last matrix answers with; 0 without a head, None when no task asks for one.

    A head may have hidden layers of its own; the last one is the one that has as many rows as there are labels, and
    when none has, the narrowest.
    """
    if labels is None:
        return None
    rows = [shape[0] for shape in inventory.head_shapes if len(shape) >= 2]
    return len(labels) if len(labels) in rows else min(rows, default=0)
