"""What the pipeline asks of a kind of task, and what all classifications have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from modelweld.config import Evaluate
from modelweld.evaluation.cache import Predictions
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.labels import Classes, LabelSpace
from modelweld.evaluation.metrics import DIGITS, Resampling, score_systems
from modelweld.formats.scores import BASE, SystemScores
from modelweld.kinds import KINDS, Declaration

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from modelweld.evaluation.settings import Settings

Pick = Callable[[int], Sequence[int]]
Advance = Callable[[int], None]
Inspector = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Server = Callable[[Sequence[Any]], "pandas.DataFrame"]


class Rows(Protocol):
    """Evaluation rows in their file's order: what the model reads, and what it should answer."""

    @property
    def inputs(self) -> Sequence[Any]: ...

    @property
    def labels(self) -> tuple[int | str, ...]: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def where(self) -> str: ...

    def __len__(self) -> int: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class Inspection:
    """What validation sees in one row: `identity` is equal for inputs that a reader would call the same.

    An empty identity is equal to nothing. `findings` are the kind's own columns of the validation table.
    """

    identity: str
    findings: Mapping[str, Any]


class TaskKind(ABC):
    """One kind of task. An instance holds no state; its file defines it as `KIND`.

    `architecture` is how the names of its transformers classes end, `noun` what a model of it reads. `finding_types`
    and `target_types` are the columns that `inspect` and `target_inspector` fill in, in order, with a pandas dtype
    where the choice cannot be left to pandas.
    """

    name: str
    architecture: str
    noun: str
    finding_types: Mapping[str, str | None]
    target_types: Mapping[str, str | None]

    @property
    def declaration(self) -> Declaration:
        """Its entry in the table."""
        return KINDS[self.name]

    # Reading

    @abstractmethod
    def read(self, spec: DatasetSpec, pick: Pick | None = None) -> Rows:
        """The rows with their targets; of all, those whose numbers `pick` gives. InputError naming what is wrong."""

    @abstractmethod
    def read_inputs(self, spec: DatasetSpec, pick: Pick | None = None) -> Sequence[Any]:
        """The inputs alone, as `Rows.inputs`; no target is asked for."""

    @abstractmethod
    def fingerprint(self, value: Any) -> bytes:
        """Bytes that tell one input from another, for the record of calibration rows."""

    # Validating

    @abstractmethod
    def inspect(self, cells: Mapping[str, Any]) -> Inspection:
        """What is in the input cells of one row, by role. A cell that cannot be read is a finding, not an error."""

    @abstractmethod
    def target_inspector(self, class_names: Mapping[str, tuple[str, ...] | None], labels: Sequence[str]) -> Inspector:
        """What gives the target's columns of the validation table for the target cells of one row, by role.

        `class_names` are the set's own names of integers, by role; `labels` are what the head can answer.
        """

    # Predicting

    @abstractmethod
    def inputs_digest(self, folders: Sequence[Path]) -> str:
        """A digest of what turns rows into the model's inputs: its tokenizer, or its image processor."""

    @abstractmethod
    def prepare(self, inputs: Sequence[Any], folders: Sequence[Path], settings: Settings) -> Any:
        """The inputs as `predict` takes them. Models with equal `inputs_digest` share them.

        The first of `folders` is the model's own; the others are asked for what it lacks.
        """

    @abstractmethod
    def predict(self, model: Any, prepared: Any, settings: Settings, advance: Advance, where: str) -> Predictions:
        """Predictions in the rows' order. `advance` is called with the number of rows of each batch."""

    # Aligning

    @abstractmethod
    def calibration_batches(
        self, inputs: Sequence[Any], folders: Sequence[Path], max_length: int, seed: int
    ) -> list[dict[str, Tensor]]:
        """Calibration inputs in batches, as keyword arguments of a model's forward."""

    # Scoring

    @abstractmethod
    def classes(self, config: Mapping[str, Any], where: str) -> LabelSpace:
        """What a model's head can answer, from its config; CheckpointError where the config contradicts itself."""

    @abstractmethod
    def truth(self, rows: Rows, space: LabelSpace, task: str) -> Classes:
        """The rows' targets as `predict` answers; InputError naming the first row that no head could answer."""

    @abstractmethod
    def score(
        self,
        truth: Classes,
        predictions: Mapping[str, Predictions],
        digests: Mapping[str, str],
        evaluate: Evaluate,
        where: str,
        reference: str,
    ) -> dict[str, SystemScores]:
        """Every system's metrics with their intervals, normalised by those of `reference`."""

    def doubts(self, truth: Classes, scored: Mapping[str, SystemScores], space: LabelSpace) -> list[str]:
        """Sentences about scores that mean little, for a warning; by default none."""
        return []

    @abstractmethod
    def prediction_columns(
        self, truth: Classes, predictions: Mapping[str, Predictions], space: LabelSpace
    ) -> dict[str, pa.Array]:
        """The columns of predictions/<task>.parquet after `row`, in order."""

    # Serving

    @abstractmethod
    def served_rows(self, model_input: Any) -> list[Any]:
        """The inputs in what a caller of a registered version passed; InputError naming the row that is none."""

    @abstractmethod
    def server(self, model: Any, folder: Path, max_length: int, device: str) -> Server:
        """What answers served rows, with the columns of `declaration.served_outputs`; `model` is on `device`."""


class ClassificationKind(TaskKind):
    """One class out of several per row: the truth, the scores and the columns of every such kind."""

    target_types = {"label": None, "label_id": "float64", "unknown_label": None}  # noqa: RUF012

    def target_inspector(self, class_names: Mapping[str, tuple[str, ...] | None], labels: Sequence[str]) -> Inspector:
        """Columns label (as written), label_id (as the head counts) and unknown_label."""
        space, own_names = LabelSpace(tuple(labels)), class_names["label"]

        def inspect(cells: Mapping[str, Any]) -> Mapping[str, Any]:
            label = cells["label"]
            number = space.number(label, own_names)
            return {
                "label": None if label is None or label == "" else str(label),
                "label_id": number,
                "unknown_label": str(label) if number is None and label not in (None, "") else None,
            }

        return inspect

    def classes(self, config: Mapping[str, Any], where: str) -> LabelSpace:
        """The classes of the head, by number."""
        return LabelSpace.from_config(config, where)

    def truth(self, rows: Rows, space: LabelSpace, task: str) -> Classes:
        """Class numbers (rows,)."""
        return space.encode(rows, task)

    def score(
        self,
        truth: Classes,
        predictions: Mapping[str, Predictions],
        digests: Mapping[str, str],
        evaluate: Evaluate,
        where: str,
        reference: str,
    ) -> dict[str, SystemScores]:
        """Accuracy and macro-F1, with McNemar's test against `reference`."""
        classes = {name: found.classes for name, found in predictions.items()}
        resampling = Resampling(evaluate.bootstrap, evaluate.confidence, evaluate.seed)
        return score_systems(truth, classes, digests, evaluate.metric, resampling, where=where, reference=reference)

    def doubts(self, truth: Classes, scored: Mapping[str, SystemScores], space: LabelSpace) -> list[str]:
        """Systems that are right no more often than the most frequent class is; the base is expected to be such."""
        counts = np.bincount(truth, minlength=len(space))
        share, name = round(float(counts.max() / len(truth)), DIGITS), space.names[int(counts.argmax())]
        weak = [system for system, found in scored.items() if system != BASE and found.accuracy.value <= share]
        if not weak:
            return []
        return [f"{', '.join(weak)}: accuracy is at or below {share:.3f}, that of always answering {name!r}"]

    def prediction_columns(
        self, truth: Classes, predictions: Mapping[str, Predictions], space: LabelSpace
    ) -> dict[str, pa.Array]:
        """The label, then every system's label and its probability."""
        names = pa.array(space.names, pa.string())
        columns = {"label": names.take(pa.array(truth))}
        for system, found in predictions.items():
            columns[system] = names.take(pa.array(found.classes))
            columns[f"{system}.confidence"] = pa.array(found.confidence)
        return columns
