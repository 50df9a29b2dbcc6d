"""Scores of values of alpha: the merge that each gives, made in memory and evaluated on validation rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from modelweld.alignment.batch_statistics import recompute_statistics, recomputes_statistics
from modelweld.alignment.models import AlignedModel
from modelweld.alignment.rows import Calibration, accuracy_on
from modelweld.alignment.views import placed_inputs
from modelweld.config.align import Align
from modelweld.config.methods import Linear
from modelweld.engine import Inputs, Plan, merge_in_memory
from modelweld.engine.cost.estimate import matrix_work
from modelweld.engine.plan.inputs import task_of
from modelweld.engine.plan.records import TensorPlan
from modelweld.errors import ConfigError
from modelweld.methods.registry import method
from modelweld.symmetry import Alignment, Zipped

# About a minute of factorising here; instead of a method that takes longer for the whole curve, the mean is scored.
AFFORDABLE_FLOPS = 2e12
STAND_IN = Linear()


@dataclass(frozen=True)
class _Trial:
    """One task's validation rows, and which expert answers them."""

    expert: int
    accuracy: Callable[[Any], float]


class Scorer:
    """Scores of merges by alpha on the validation rows. The modules it is given are overwritten."""

    def __init__(
        self,
        settings: Align,
        plan: Plan,
        models: Sequence[AlignedModel],
        modules: Sequence[nn.Module],
        inputs: Inputs,
        calibration: Calibration,
    ) -> None:
        self._settings, self._models, self._inputs = settings, models, inputs
        labels = [model.label for model in models]
        self._modules = [modules[labels.index(expert.label)] for expert in inputs.experts]
        self._module_names = [models[labels.index(expert.label)].module_names for expert in inputs.experts]
        self._trials = _trials(settings, inputs)
        self._plan = affordable(plan, len(inputs.experts), len(settings.grid))
        self._calibration = calibration if recomputes_statistics(settings, plan) else None

    def curve(self, match: Callable[[float], Alignment | Zipped]) -> dict[float, float]:
        """By alpha, the mean accuracy over tasks of the merge of the aligned set."""
        return {alpha: self._score(match(alpha)) for alpha in self._settings.grid}

    @property
    def stood_in(self) -> bool:
        """Whether the (weighted) mean was scored instead of a method that is too slow to try."""
        return any(tensor.parameters is STAND_IN for tensor in self._plan.tensors)

    def _score(self, found: Alignment | Zipped) -> float:
        views = placed_inputs(self._inputs, self._models, found.placed)
        merged = merge_in_memory(self._plan, views)
        scores = []
        for trial in self._trials:
            module, expert = self._modules[trial.expert], views.experts[trial.expert]
            names = expert.name_map.names
            state = {names[name]: tensor for name, tensor in merged.items() if name in names}
            state |= {name: expert.checkpoint.read(name) for name in expert.name_map.head}
            own = self._module_names[trial.expert]
            module.load_state_dict({own[name]: tensor for name, tensor in state.items() if name in own}, strict=False)
            if self._calibration is not None:
                recompute_statistics(module, self._calibration)
            scores.append(trial.accuracy(module))
        return sum(scores) / len(scores)


def affordable(plan: Plan, experts: int, times: int) -> Plan:
    """The plan, or if its matrix methods would take too long that many times, one with the mean in their place."""

    def slow(tensor: TensorPlan) -> bool:
        return tensor.parameters is not None and method(tensor.parameters.method).whole_matrix

    works = [matrix_work(tensor, experts) for tensor in plan.tensors if slow(tensor)]
    if times * sum(work.gemm + work.eigh for work in works) <= AFFORDABLE_FLOPS:
        return plan
    plain: dict[str, Any] = {"parameters": STAND_IN, "transposed": False, "packing": None, "route": "dense"}
    return replace(plan, tensors=tuple(replace(t, **plain) if slow(t) else t for t in plan.tensors))


def _trials(settings: Align, inputs: Inputs) -> list[_Trial]:
    named: Mapping[str, Any] = settings.validation or {}
    trials = [
        _Trial(number, accuracy_on(named[task_of(expert)], settings, task_of(expert), expert, inputs))
        for number, expert in enumerate(inputs.experts)
        if task_of(expert) in named and expert.name_map.head
    ]
    if not trials:
        raise ConfigError(
            "alpha: auto needs labelled rows of a task that an expert has a head for",
            where="align.validation",
            hint="validation: {task: {dataset: …, split: validation}}",
        )
    return trials
