"""The classes of a head, and a set's labels as their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from modelweld.errors import CheckpointError, InputError

Classes = NDArray[np.int64]


class Labelled(Protocol):
    """Rows with raw labels: texts or images. `class_names` are the set's own names of integer labels."""

    @property
    def labels(self) -> tuple[int | str, ...]: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def where(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class LabelSpace:
    """Class names by class number."""

    names: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """The classes of a transformers config (config.json of an expert); CheckpointError when it contradicts itself.

        A config without names is a two-class one: transformers leaves its default out of the file.
        """
        table = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        by_number = {int(number): str(name) for number, name in table.items()}
        if sorted(by_number) != list(range(len(by_number))):
            raise CheckpointError(
                f"id2label has the numbers {sorted(by_number)}, not 0…{len(by_number) - 1}",
                where=where,
                hint="fix id2label and label2id of its config.json",
            )
        names = tuple(by_number[number] for number in range(len(by_number)))
        inverse = {str(name): int(number) for name, number in (config.get("label2id") or {}).items()}
        if len(set(names)) < len(names) or (inverse and inverse != {name: i for i, name in enumerate(names)}):
            raise CheckpointError(
                "id2label and label2id contradict each other", where=where, hint="fix them in its config.json"
            )
        if len(names) < 2:
            raise CheckpointError(
                "a head with a single output is a regression, not a classification",
                where=where,
                hint="evaluate a model with two classes or more",
            )
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _numeric(self) -> bool:
        return bool(self.names) and all(name.lstrip("-").isdigit() for name in self.names)

    def number(self, label: Any, class_names: tuple[str, ...] | None) -> int | None:
        """The class number of a raw label; None when this head has no such class.

        Names are looked up. Integers are class numbers, except where they are names: a set that declares names for
        its integers (`class_names`) is read by those names when the head knows any of them, and a head whose names are
        themselves integers (star ratings 1…5) is asked by name.
        """
        if isinstance(label, str):
            return self._by_name.get(label)
        if not isinstance(label, int):
            return None
        if class_names and not self._by_name.keys().isdisjoint(class_names):
            return self._by_name.get(class_names[label]) if 0 <= label < len(class_names) else None
        if self._numeric:
            return self._by_name.get(str(int(label)))
        return int(label) if 0 <= label < len(self) else None

    def encode(self, rows: Labelled, task: str) -> Classes:
        """The rows' labels as class numbers; InputError naming the first row whose label this head does not know."""
        classes = np.empty(len(rows), dtype=np.int64)
        for row, label in enumerate(rows.labels):
            number = self.number(label, rows.class_names)
            if number is None:
                shown = ", ".join(self.names[:8]) + (", …" if len(self) > 8 else "")
                raise InputError(
                    f"task {task}, row {row}: label {label!r} is none of the head's {len(self)} classes ({shown})",
                    where=rows.where,
                    hint="fix the row, or id2label and label2id in the expert's config.json",
                )
            classes[row] = number
        return classes
