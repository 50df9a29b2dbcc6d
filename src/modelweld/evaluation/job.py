"""One evaluation: several systems on the rows of one task, predicted, cached by content, and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelweld.config import Evaluate
from modelweld.errors import CheckpointError
from modelweld.evaluation.cache import PredictionCache, Predictions
from modelweld.evaluation.kinds.base import Rows, TaskKind
from modelweld.evaluation.labels import Classes, LabelSpace
from modelweld.evaluation.progress import evaluation_progress
from modelweld.evaluation.settings import Settings
from modelweld.evaluation.systems import System, model_digest, open_system, prediction_key
from modelweld.formats.scores import EXPERT, PrecisionChoice, TaskScores, reading_order

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationJob:
    """One set of rows, and all that predicting and scoring them needs besides the systems."""

    task: str
    kind: TaskKind
    rows: Rows
    space: LabelSpace
    settings: Settings
    evaluate: Evaluate
    cache: PredictionCache

    def run(self, systems: Sequence[System], reference: str) -> EvaluationResult:
        """Every system's predictions and scores; scores are normalised by those of the system `reference`.

        InputError for a row that no head could answer, CheckpointError for a head with other classes than the job's.
        """
        truth = self.kind.truth(self.rows, self.space, self.task)
        digests = {system.name: model_digest(system) for system in systems}
        predictions = self._predict_all(systems, digests)
        where = f"task {self.task}"
        scored = self.kind.score(truth, predictions, digests, self.evaluate, where, reference)
        for doubt in self.kind.doubts(truth, scored, self.space):
            _log.warning("%s, %s", where, doubt)
        scores = TaskScores(
            task=self.task,
            dataset_digest=self.rows.digest(),
            rows=len(self.rows),
            metric=self.evaluate.metric,
            confidence=self.evaluate.confidence,
            bootstrap=self.evaluate.bootstrap,
            precision=PrecisionChoice(requested=self.evaluate.precision, used=self.settings.precision),
            systems={name: scored[name] for name in reading_order(scored)},
        )
        return EvaluationResult(truth, predictions, scores)

    def _predict_all(self, systems: Sequence[System], digests: Mapping[str, str]) -> dict[str, Predictions]:
        # A merge without a processor file of its own is fed as the task's expert was.
        expert = [path for system in systems if system.name == EXPERT for path in (system.backbone, system.side_files)]
        dataset, prepared = self.rows.digest(), dict[str, Any]()
        predictions: dict[str, Predictions] = {}
        with evaluation_progress(self.task, len(systems) * len(self.rows)) as advance:
            for system in systems:
                folders = [system.side_files, *expert]
                inputs = self.kind.inputs_digest(folders)
                key = prediction_key(system, digests[system.name], inputs, dataset, self.space, self.settings)
                found = self.cache.get(key, len(self.rows))
                if found is None:
                    found = self._predict(system, folders, inputs, prepared, advance)
                    self.cache.put(key, found)
                else:
                    advance(len(self.rows))
                predictions[system.name] = found
        return predictions

    def _predict(
        self,
        system: System,
        folders: Sequence[Path],
        inputs: str,
        prepared: dict[str, Any],
        advance: Callable[[int], None],
    ) -> Predictions:
        """Predictions of one system. `prepared` holds the rows by the digest of what prepared them, for all systems."""
        model = open_system(system, self.kind.name)
        own = self.kind.classes(model.config.to_dict(), str(system.backbone))
        if own != self.space:
            raise CheckpointError(
                f"its head has the classes {list(own.names)}, the expert's {list(self.space.names)}",
                where=str(system.backbone),
                hint="merge again: heads are taken from the experts as they are",
            )
        if inputs not in prepared:
            prepared[inputs] = self.kind.prepare(self.rows.inputs, folders, self.settings)
        where = f"task {self.task}, {system.name} ({system.backbone})"
        return self.kind.predict(model, prepared[inputs], self.settings, advance, where)


@dataclass(frozen=True)
class EvaluationResult:
    """The truth, each system's predictions, and the scores."""

    truth: Classes
    predictions: dict[str, Predictions]
    scores: TaskScores

    @property
    def ordered_predictions(self) -> dict[str, Predictions]:
        """The predictions in the order of the scores: base, expert, the baselines by name, merged."""
        return {name: self.predictions[name] for name in reading_order(self.predictions)}
