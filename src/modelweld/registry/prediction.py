"""Predicting with a registered version: rows in, a frame of predictions out, one head at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelweld import settings
from modelweld.errors import InputError
from modelweld.evaluation.kinds import kind_of
from modelweld.formats.address import DvcAddress
from modelweld.kinds import DEFAULT, KINDS, ServedColumn
from modelweld.registry.materialise import materialise

if TYPE_CHECKING:
    import pandas

    from modelweld.evaluation.kinds.base import Server


@dataclass(frozen=True)
class ServedTask:
    """One head of a registered version: its kind of task, and the number of tokens its texts are cut to."""

    max_length: int
    kind: str = DEFAULT

    def to_config(self) -> int | dict[str, Any]:
        """What the version's model_config holds; for texts the number of tokens, as every release reads it."""
        return self.max_length if self.kind == DEFAULT else asdict(self)

    @classmethod
    def from_config(cls, value: Any) -> Self:
        """The record that `to_config` gave."""
        return cls(value) if isinstance(value, int) else cls(**value)


class Predictor:
    """A merged directory that predicts; each head is loaded at its first use and kept."""

    def __init__(self, directory: Path, tasks: Mapping[str, ServedTask], device: str = "cpu") -> None:
        self.directory = directory
        self.tasks = dict(tasks)
        self.device = device
        self._servers: dict[str, Server] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The predictor that a version's model_config describes; fetches the weights."""
        address = DvcAddress.from_data(config["dvc"], "model_config")
        tasks = {task: ServedTask.from_config(value) for task, value in config["tasks"].items()}
        return cls(materialise(address), tasks, _device())

    def predict(self, model_input: Any, task: str | None = None) -> pandas.DataFrame:
        """One row per row of `model_input`, with the columns that the task's kind declares as served.

        Texts are a frame or a mapping with a column `text`, or a list of strings; images a frame or a mapping with a
        column `image`. InputError for anything else, naming the row, and for a task that the version does not have.
        """
        chosen = self._choose(task)
        return self._server(chosen)(kind_of(self.tasks[chosen].kind).served_rows(model_input))

    def _choose(self, task: str | None) -> str:
        known = ", ".join(sorted(self.tasks))
        if task:
            if task not in self.tasks:
                raise InputError(f"no head for task {task!r}", where="params", hint=f"one of: {known}")
            return task
        if len(self.tasks) != 1:
            hint = f'predict(rows, params={{"task": …}}) with one of: {known}'
            raise InputError("this model has several heads; name one", where="params", hint=hint)
        return next(iter(self.tasks))

    def _server(self, task: str) -> Server:
        if task not in self._servers:
            from modelweld.checkpoints.loading import load

            model = load(self.directory, task, device=self.device).eval()
            served = self.tasks[task]
            self._servers[task] = kind_of(served.kind).server(model, self.directory, served.max_length, self.device)
        return self._servers[task]


def served_columns(tasks: Mapping[str, ServedTask]) -> tuple[list[ServedColumn], list[ServedColumn]]:
    """The columns of input and output over all tasks of a version, each once.

    Input columns are empty where a list of strings is enough, as for texts: MLflow would refuse such a list wherever a
    column is named.
    """
    declared = [KINDS[name] for name in sorted({task.kind for task in tasks.values()})]
    inputs = list(dict.fromkeys(column for kind in declared for column in kind.served_inputs))
    outputs = list(dict.fromkeys(column for kind in declared for column in kind.served_outputs))
    return ([] if [column.type for column in inputs] == ["string"] else inputs), outputs


def _device() -> str:
    import torch

    wanted = settings.first_device()
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
