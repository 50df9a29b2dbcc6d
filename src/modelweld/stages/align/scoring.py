"""How good a value of alpha is: the merge it leads to, scored on validation rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from modelweld.config.align import Align
from modelweld.errors import ConfigError
from modelweld.merging.engine import Inputs
from modelweld.merging.engine.inputs import task_of
from modelweld.stages.align.members import BASE, Member
from modelweld.stages.align.rows import accuracy_on
from modelweld.symmetry import Alignment, Zipped
from modelweld.symmetry.placements import Folded, Permuted


@dataclass(frozen=True)
class _Trial:
    """One task's validation rows, and which of the models answers them."""

    position: int
    accuracy: Callable[[Any], float]


class Scorer:
    """Scores of merges by alpha on the validation rows. The models it is given are overwritten."""

    def __init__(self, settings: Align, members: Sequence[Member], models: Sequence[nn.Module], inputs: Inputs) -> None:
        self.settings, self.members, self.models = settings, members, models
        self.trials = _trials(settings, members, inputs)

    def curve(self, match: Callable[[float], Alignment | Zipped]) -> dict[float, float]:
        """By alpha, the mean accuracy over tasks of the plain mean of the aligned set."""
        return {alpha: self._score(match(alpha).placed) for alpha in self.settings.grid}

    def _score(self, placed: Permuted | Folded) -> float:
        merged = _mean(self.members, placed)
        scores = []
        for trial in self.trials:
            model, member = self.models[trial.position], self.members[trial.position]
            own = replace(placed, spec=member.spec)
            state: Mapping[str, Tensor] = {member.names[name]: tensor for name, tensor in merged.items()} | {
                name: own.tensor(name, member.checkpoint.read(name).float(), trial.position)
                for name in member.spec.axes
                if name in member.checkpoint.tensors and name not in member.names.values()
            }
            model.load_state_dict(state, strict=False)
            scores.append(trial.accuracy(model))
        return sum(scores) / len(scores)


def _trials(settings: Align, members: Sequence[Member], inputs: Inputs) -> list[_Trial]:
    named = settings.validation or {}
    labels = [member.label for member in members]
    trials = []
    for expert in inputs.experts:
        task = task_of(expert)
        if task in named and expert.alignment.head:
            accuracy = accuracy_on(named[task], settings, task, expert, inputs.reference.path)
            trials.append(_Trial(labels.index(expert.label), accuracy))
    if not trials:
        raise ConfigError(
            "alpha: auto needs labelled rows of a task that an expert has a head for",
            where="align.validation",
            mend="validation: {task: {dataset: …, split: validation}}",
        )
    return trials


def _mean(members: Sequence[Member], placed: Permuted | Folded) -> dict[str, Tensor]:
    """The backbone of the aligned set's mean, by common names; what no group lies on is averaged as it is."""
    merged: dict[str, Tensor] = {}
    experts = [(position, member) for position, member in enumerate(members) if member.label != BASE]
    for name in members[0].names:
        total: Tensor | None = None
        for position, member in experts:
            stored = member.names[name]
            own = replace(placed, spec=member.spec).tensor(stored, member.checkpoint.read(stored).float(), position)
            total = own if total is None else total.add_(own)
        if total is not None:
            merged[name] = total.div_(len(experts))
    return merged
