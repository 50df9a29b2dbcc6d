"""The table of task kinds: the names, columns and metrics of each, for configuration and commands.

Importing it loads nothing: what a kind *does* (read, validate, predict, score, serve) is one file for each kind,
`modelweld.evaluation.kinds.<name>`, which is imported on first use. docs/evaluation.md lists what a new kind needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

DEFAULT = "text-classification"


@dataclass(frozen=True)
class Column:
    """One column of a kind's rows. `role` is its name everywhere but in the file; targets are what is predicted."""

    role: str
    description: str
    is_target: bool = False


@dataclass(frozen=True)
class Metric:
    """One number that a kind's predictions are judged by."""

    name: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class ServedColumn:
    """One column of what a served model takes or returns; `any` is a type that MLflow passes on as it is."""

    name: str
    type: Literal["string", "double", "any"]


@dataclass(frozen=True)
class Declaration:
    """What everything but the prediction itself needs to know of a kind of task.

    `modality` is what its models read: calibration rows of one alignment share it. `suite` is the file of expectations
    that its evaluation rows are validated by. The first metric is the primary one. `served_as` says in words what a
    registered version takes, `served_example` is one such row.
    """

    name: str
    modality: Literal["text", "image"]
    columns: tuple[Column, ...]
    suite: str
    metrics: tuple[Metric, ...]
    served_inputs: tuple[ServedColumn, ...]
    served_outputs: tuple[ServedColumn, ...]
    served_as: str
    served_example: dict[str, Any] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of all columns."""
        return tuple(column.role for column in self.columns)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The roles of the columns that the model reads."""
        return tuple(column.role for column in self.columns if not column.is_target)

    @property
    def targets(self) -> tuple[str, ...]:
        """The roles of the columns that hold what the model should answer."""
        return tuple(column.role for column in self.columns if column.is_target)

    @property
    def module(self) -> str:
        """The module that holds the kind's behaviour as `KIND`."""
        return f"modelweld.evaluation.kinds.{self.name.replace('-', '_')}"


_LABEL = Column("label", "class names, or class numbers", is_target=True)
_CLASSIFICATION = (Metric("accuracy"), Metric("macro_f1"))
_CLASS = (ServedColumn("label", "string"), ServedColumn("confidence", "double"))

_TABLE = (
    Declaration(
        name="text-classification",
        modality="text",
        columns=(Column("text", "texts"), _LABEL),
        suite="evaluation",
        metrics=_CLASSIFICATION,
        served_inputs=(ServedColumn("text", "string"),),
        served_outputs=_CLASS,
        served_as="a DataFrame with a string column `text`, or a list of strings",
    ),
    Declaration(
        name="image-classification",
        modality="image",
        columns=(Column("image", "images, encoded or as arrays"), _LABEL),
        suite="images",
        metrics=_CLASSIFICATION,
        served_inputs=(ServedColumn("image", "any"),),
        served_outputs=_CLASS,
        served_as="a DataFrame with a column `image`: encoded bytes, base64, arrays of unsigned bytes, or {path: …}",
        served_example={"image": [[0, 85, 170, 255] * 2] * 8},
    ),
)

KINDS: dict[str, Declaration] = {kind.name: kind for kind in _TABLE}
METRICS: tuple[str, ...] = tuple(dict.fromkeys(metric.name for kind in _TABLE for metric in kind.metrics))
SUITES: tuple[str, ...] = tuple(dict.fromkeys(kind.suite for kind in _TABLE))
ROLES: tuple[str, ...] = tuple(dict.fromkeys(role for kind in _TABLE for role in kind.roles))

# What a parameter may be, as choices of JSON Schema and of the command line.
if TYPE_CHECKING:
    KindName = str
    MetricName = str
else:
    KindName = Literal[tuple(KINDS)]
    MetricName = Literal[METRICS]


def implied_by(roles: Iterable[str]) -> str | None:
    """The kind of rows that have these columns, where only one kind has an input of such a role; else None."""
    telling = set(roles) - set(KINDS[DEFAULT].inputs)
    found = [kind.name for kind in _TABLE if telling.intersection(kind.inputs)]
    return found[0] if len(found) == 1 else None
