"""Merging two classifiers of different classes, every way there is, and scoring what comes out.

Each expert has a head for its own classes. A merge has one backbone and both heads, each moved to the merged units:
within its own classes it answers a task, and over the logits of both heads laid side by side it answers jointly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelweld.symmetry import Spec, align, check_invariance, derive_spec, zip_models
from modelweld.symmetry.observing import observe
from modelweld.symmetry.placements import Clustered, Permuted
from modelweld.symmetry.repair import repair

Placed = Permuted | Clustered
BATCH = 250


@dataclass(frozen=True)
class Rows:
    """Inputs of both tasks, and their classes counted through: the second task's come after the first's."""

    inputs: Tensor
    classes: Tensor

    def batches(self) -> list[dict[str, Tensor]]:
        return [{"pixel_values": part} for part in self.inputs.split(BATCH)]


@dataclass(frozen=True)
class Pair:
    """Two experts of one architecture. `joint` makes a model with both heads' classes, `heads` are a head's tensors."""

    experts: tuple[nn.Module, nn.Module]
    joint: Callable[[], nn.Module]
    heads: tuple[str, ...]
    spec: Spec

    @classmethod
    def of(cls, experts: tuple[nn.Module, nn.Module], joint: Callable[[], nn.Module], inputs: Tensor) -> Pair:
        """The pair with its derived symmetries, checked on some inputs before they are used."""
        example = {"pixel_values": inputs[:2]}
        spec = derive_spec(experts[0], example)
        for expert in experts:
            check_invariance(expert, spec, example)
        wide = joint().state_dict()
        heads = tuple(name for name, tensor in experts[0].state_dict().items() if tensor.shape != wide[name].shape)
        return cls(experts, joint, heads, spec)

    @property
    def states(self) -> list[dict[str, Tensor]]:
        return [expert.state_dict() for expert in self.experts]


@dataclass(frozen=True)
class Score:
    """Accuracy within each task's own classes, and over all classes of both."""

    tasks: tuple[float, float]
    joint: float

    @property
    def per_task(self) -> float:
        return sum(self.tasks) / 2


@dataclass
class Results:
    """Scores on test rows by system, and what the search for alpha saw on validation rows."""

    scores: dict[str, Score] = field(default_factory=dict)
    curves: dict[str, dict[float, float]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)


def merged(pair: Pair, placed: Placed) -> nn.Module:
    """The mean of both backbones in common units, with both heads."""
    states = pair.states
    state = {}
    for name, first in states[0].items():
        parts = [placed.tensor(name, one[name], number) for number, one in enumerate(states)]
        if name in pair.heads:
            state[name] = torch.cat(parts)
        else:
            state[name] = torch.stack(parts).mean(dim=0) if first.is_floating_point() else first
    model = pair.joint()
    model.load_state_dict(state)
    return model.eval()


def repaired(model: nn.Module, calibration: Rows) -> nn.Module:
    """The same model with BatchNorm statistics of its own, where it has any."""
    fresh = copy.deepcopy(model)
    repair(fresh, calibration.batches())
    return fresh


def logits_of(model: nn.Module, rows: Rows) -> Tensor:
    """Logits (rows, classes)."""
    with torch.inference_mode():
        found: list[Any] = [model(**batch) for batch in rows.batches()]
    return torch.cat([getattr(one, "logits", one) for one in found])


def score(logits: Tensor, rows: Rows, first: int) -> Score:
    """Scores of logits over both tasks' classes; the first task has the first `first` of them."""
    of_second = rows.classes >= first
    within = (
        float((logits[~of_second, :first].argmax(-1) == rows.classes[~of_second]).float().mean()),
        float((logits[of_second, first:].argmax(-1) + first == rows.classes[of_second]).float().mean()),
    )
    return Score(within, float((logits.argmax(-1) == rows.classes).float().mean()))


def compare(
    pair: Pair, calibration: Rows, validation: Rows, test: Rows, *, alphas: Sequence[float], observed: int, seed: int
) -> tuple[Results, dict[str, Placed]]:
    """Every system's scores on `test`, and where the units went in each merge.

    Similarities of activations come from the first `observed` calibration rows, new BatchNorm statistics from all of
    them; neither uses a label. Alpha is what gave the best joint accuracy on `validation`.
    """
    results, placements = Results(), {}
    first = pair.experts[0](pixel_values=test.inputs[:1])
    classes = getattr(first, "logits", first).shape[-1]
    alone = [logits_of(expert, test) for expert in pair.experts]
    together = score(torch.cat(alone, dim=1), test, classes)
    # Alone, a model knows its own classes only and is right on none of the other's.
    hits = torch.stack([alone[0].argmax(-1) == test.classes, alone[1].argmax(-1) + classes == test.classes])
    results.scores["single models"] = Score(together.tasks, float(hits.float().mean()))
    results.scores["ensemble"] = together
    seen = Rows(calibration.inputs[:observed], calibration.classes[:observed])
    activations = observe(list(pair.experts), pair.spec, seen.batches())
    none: Mapping[str, Tensor] = {}

    def tried(name: str, placed: Placed) -> None:
        placements[name] = placed
        model = repaired(merged(pair, placed), calibration)
        results.scores[name] = score(logits_of(model, test), test, classes)

    plain = Permuted(pair.spec, [pair.spec.identity() for _ in pair.experts])
    results.scores["average, old statistics"] = score(logits_of(merged(pair, plain), test), test, classes)
    tried("average", plain)

    def aligned(given: Mapping[str, Tensor], alpha: float) -> Placed:
        return Permuted(pair.spec, list(align(pair.states, pair.spec, given, alpha, seed=seed).permutations))

    def zipped(given: Mapping[str, Tensor], alpha: float) -> Placed:
        return zip_models(pair.states, pair.spec, given, alpha, seed=seed).placed

    for kind, place in (("align", aligned), ("zip", zipped)):
        tried(f"weight {kind}", place(none, 1.0))
        tried(f"activation {kind}", place(activations, 0.0))
        curve, best = {}, (-1.0, plain)
        for alpha in alphas:
            placed = place(activations, alpha)
            model = repaired(merged(pair, placed), calibration)
            found = score(logits_of(model, validation), validation, classes).joint
            curve[alpha] = found
            if found > best[0]:
                best, results.chosen[f"MuDSC {kind}"] = (found, placed), alpha
        results.curves[f"MuDSC {kind}"] = curve
        tried(f"MuDSC {kind}", best[1])
    return results, placements
