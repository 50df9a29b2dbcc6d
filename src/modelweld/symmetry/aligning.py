"""MuDSC's alignment: permute the units of every model to model 0's order, by weights and activations at once.

Families are matched one after the other in a seeded random order; each match uses the current assignment of its
neighbours. A sweep that does not raise the mean matched similarity is undone; `patience` such sweeps end the search.
Source: arXiv 2403.01753, algorithm 1; nested families and one head order for q, k, v and o are this project's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.symmetry.families import AxisUse, Family, families
from modelweld.symmetry.matching import Matrix, match, match_nested
from modelweld.symmetry.placements import Clustered, Permuted
from modelweld.symmetry.similarity import between, weight_similarity
from modelweld.symmetry.spec import Permutations, Spec
from modelweld.symmetry.view import Stored
from modelweld.symmetry.zipping import Similarities, zip_units

Mode = Literal["default", "reference"]

PAPER_SMOOTHING = 1e-5


@dataclass(frozen=True)
class Alignment:
    """`permutations[i]` brings model i to model 0; `trace` is the objective sweep by sweep."""

    spec: Spec
    permutations: tuple[Permutations, ...]
    objective: float
    trace: tuple[float, ...] = ()
    matched: Mapping[str, float] = field(default_factory=dict)

    @property
    def placed(self) -> Permuted:
        """`placed.tensor(name, tensor, i)` gives model i's tensor in model 0's order."""
        return Permuted(self.spec, list(self.permutations))

    def identity_shares(self) -> dict[str, float]:
        """By group, the share of units of all models but the first that stay where they are."""
        return _identity_shares(self.permutations)

    def identity_share(self) -> float:
        """The same over all units: 1 for finetunes of one base."""
        return _overall(self.identity_shares(), self.permutations[0])


@dataclass(frozen=True)
class Zipped:
    """`placed.tensor(name, tensor, i)` gives model i's tensor in the merged units; their mean is the merge."""

    placed: Clustered
    objective: float
    trace: tuple[float, ...] = ()
    matched: Mapping[str, float] = field(default_factory=dict)

    def identity_shares(self) -> dict[str, float]:
        """By group, the share of units that went where the first model's unit of the same number went."""
        return _identity_shares(self.placed.assignments)

    def identity_share(self) -> float:
        """The same over all units: 1 for finetunes of one base."""
        return _overall(self.identity_shares(), self.placed.assignments[0])


def _identity_shares(assignments: Sequence[Permutations]) -> dict[str, float]:
    return {
        name: float(torch.stack([moved[name] == own for moved in assignments[1:]]).double().mean())
        for name, own in assignments[0].items()
    }


def _overall(shares: Mapping[str, float], units: Permutations) -> float:
    total = sum(units[name].numel() for name in shares)
    return sum(share * units[name].numel() for name, share in shares.items()) / total if total else 1.0


def align(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: Spec,
    activations: Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    *,
    seed: int = 0,
    patience: int = 5,
    sweeps: int = 100,
    mode: Mode = "default",
) -> Alignment:
    """Permutations that bring every model to the first one.

    >>> from torch import nn
    >>> from modelweld.symmetry import derive_spec
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    >>> spec = derive_spec(model, (torch.zeros(1, 8),))
    >>> shuffled = spec.apply(model.state_dict(), {"0.weight[0]": torch.tensor([2, 0, 3, 1])})
    >>> align([model.state_dict(), shuffled], spec).permutations[1]
    {'0.weight[0]': tensor([1, 3, 0, 2])}

    States may be lazy (`view.Stored`): one module's weights are held at a time. `activations` holds, by group, the
    correlation of (models · units), or of the first model's units with all others; similarity is alpha · weights +
    (1 - alpha) · activations, and weights alone where there are none. Mode `reference` lays all weights of a unit end
    to end and leaves ties to the solver, as the paper's code does. Raises MergeError for models of different shapes.
    """
    _same_shapes(state_dicts)
    if not 0.0 <= alpha <= 1.0:
        raise MergeError(f"alpha is {alpha}", hint="0 is activations alone, 1 is weights alone")
    search = _Align(state_dicts, spec, activations or {}, alpha, mode)
    objective, trace, matched = search.run(seed, patience, sweeps)
    return Alignment(spec, tuple(search.placed.assignments), objective, trace, matched)


def zip_models(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: Spec,
    activations: Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    *,
    beta: float = 0.5,
    budget: float = 1.0,
    seed: int = 0,
    patience: int = 5,
    sweeps: int = 100,
    mode: Mode = "default",
) -> Zipped:
    """Clusters of units over all models, as many as one model has; the rest as for `align`.

    Source: ZipIt (arXiv 2305.03053) with MuDSC's dual similarity and iteration.
    """
    _same_shapes(state_dicts)
    search = _Zip(beta, budget, state_dicts, spec, activations or {}, alpha, mode)
    objective, trace, matched = search.run(seed, patience, sweeps)
    return Zipped(search.clustered(search.placed.assignments), objective, trace, matched)


def _same_shapes(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    if len(state_dicts) < 2:
        raise MergeError("alignment takes two models or more", where="models", hint="name another one")
    first = state_dicts[0]
    for number, other in enumerate(state_dicts[1:], start=1):
        for name in first:
            if name not in other:
                raise MergeError(f"model {number} has no such tensor", where=name, hint="align models of one depth")
            here, there = _shape(first, name), _shape(other, name)
            if here != there:
                raise MergeError(
                    f"shape {here} in model 0, {there} in model {number}",
                    where=name,
                    hint="alignment permutes units; it cannot make two widths one",
                )
        extra = next((name for name in other if name not in first), None)
        if extra is not None:
            raise MergeError(f"only model {number} has this tensor", where=extra, hint="align models of one depth")


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return state.shape(name) if isinstance(state, Stored) else tuple(state[name].shape)


class _Search(ABC):
    """The loop that align and zip share; what a match is, and where it puts units, is the subclass's.

    `whole` says whether a match looks at all pairs of units, or only at model 0's with all others.
    """

    whole = True

    def __init__(
        self,
        states: Sequence[Mapping[str, Tensor]],
        spec: Spec,
        activations: Mapping[str, Tensor],
        alpha: float,
        mode: Mode,
    ) -> None:
        self.states, self.spec, self.alpha, self.reference = states, spec, alpha, mode == "reference"
        self.activations = activations
        self.families = families(spec)
        self.version = dict.fromkeys(self.families, 0)
        self.seen: dict[str, tuple[tuple[int, ...], float]] = {}
        self.changes = 0
        self.placed: Permuted | Clustered = Permuted(spec, [spec.identity() for _ in states])

    @abstractmethod
    def pair_up(self, family: Family, similarities: Mapping[str, Tensor | None]) -> tuple[list[Permutations], float]:
        """Match a family over all models; where its units go, model by model, and the mean matched similarity."""

    def run(self, seed: int, patience: int, sweeps: int) -> tuple[float, tuple[float, ...], dict[str, float]]:
        """Objective, trace and matched similarities; `placed` then holds the best found."""
        names = list(self.families)
        if not names:
            return 1.0, (), {}
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, float] = {}
        if self.activations:
            # Activations need no neighbours: their match is the starting point.
            values = {name: self._match(self.families[name], 0.0) for name in names}
        elif not self.reference:
            self._start()
        best = float(np.mean(list(values.values()))) if self.alpha == 0.0 else -np.inf
        kept, matched = (self.placed.copy(), dict(self.version)), dict(values)
        trace: list[float] = []
        failures = 0
        while self.alpha > 0.0 and failures < patience and len(trace) < sweeps:
            for position in torch.randperm(len(names), generator=generator).tolist():
                values[names[position]] = self._match(self.families[names[position]], self.alpha)
            objective = float(np.mean([values[name] for name in names]))
            trace.append(objective)
            if objective > best:
                best, failures, matched = objective, 0, dict(values)
                kept = (self.placed.copy(), dict(self.version))
            else:
                failures += 1
                self.placed, self.version = kept[0].copy(), dict(kept[1])
        self.placed = kept[0]
        return best, tuple(trace), matched

    def _start(self) -> None:
        """Match every family once by the weights that can be compared already, from inputs and outputs inwards.

        Weights that connect to units in another order tell nothing; in a deep model nearly all do, and their noise
        hides the few that connect to a frozen axis. The family with the largest comparable share is always next.
        """
        waiting = dict(self.families)
        settled: set[str] = set()

        def known(family: Family, member: str) -> list[AxisUse]:
            return [use for use in family.of(member) if use.neighbours <= settled]

        def share(name: str) -> float:
            everywhere = [use for member in waiting[name].members for use in waiting[name].of(member)]
            seen = sum(use.features for member in waiting[name].members for use in known(waiting[name], member))
            return seen / max(1, sum(use.features for use in everywhere))

        while waiting:
            family = waiting.pop(max(waiting, key=share))
            self._assign(
                family,
                {member: self._weights(family, member, known(family, member) or None) for member in family.members},
            )
            settled.add(family.outer)

    def _match(self, family: Family, alpha: float) -> float:
        around = tuple(self.version[name] for name in [*sorted(family.neighbours), family.outer])
        known = self.seen.get(family.outer)
        if alpha > 0.0 and known is not None and known[0] == around:
            # No neighbour moved since: the match would be the same.
            return known[1]
        changed, value = self._assign(family, {name: self._similarity(family, name, alpha) for name in family.members})
        if changed:
            around = (*around[:-1], self.version[family.outer])
        if alpha > 0.0:
            self.seen[family.outer] = (around, value)
        return value

    def _assign(self, family: Family, similarities: Mapping[str, Tensor | None]) -> tuple[bool, float]:
        """Match a family and assign its units; whether any moved, and the mean matched similarity."""
        try:
            found, value = self.pair_up(family, similarities)
        except MergeError as error:
            raise MergeError(error.what, where=f"group {family.outer}", hint=error.hint) from error
        assignments = self.placed.assignments
        changed = False
        for model, own in enumerate(found):
            for name, assignment in own.items():
                changed |= not torch.equal(assignment, assignments[model][name])
                assignments[model][name] = assignment
        if changed:
            self.changes += 1
            self.version[family.outer] = self.changes
        return changed, value

    def _weights(self, family: Family, member: str, uses: Sequence[AxisUse] | None = None) -> Tensor | None:
        return weight_similarity(
            family, member, self.states, self.placed, uses=uses, concatenate=self.reference, whole=self.whole
        )

    def _similarity(self, family: Family, member: str, alpha: float) -> Tensor | None:
        weights = None if alpha == 0.0 and member in self.activations else self._weights(family, member)
        if member not in self.activations:
            return weights
        active = self.activations[member].double()
        units = self.spec.identity([member])[member].numel()
        if not self.whole and len(active) > units:
            active = active[:units, units:]  # (units, (models - 1) · units)
        if weights is None:
            return active
        # In place: for wide layers these are the largest matrices there are.
        return weights.mul_(alpha).add_(active, alpha=1.0 - alpha)

    def block(self, similarity: Tensor | None, model: int) -> Matrix | None:
        """Model 0's units against those of one model, shape (units, units)."""
        if similarity is None:
            return None
        units = similarity.shape[1] // (len(self.states) - (0 if self.whole else 1))
        return np.asarray(between(similarity, units, model).cpu().numpy(), dtype=np.float64)


class _Align(_Search):
    whole = False

    def pair_up(self, family: Family, similarities: Mapping[str, Tensor | None]) -> tuple[list[Permutations], float]:
        found: list[Permutations] = [{}]
        total = 0.0
        for model in range(1, len(self.states)):
            one, value = self._pair(family, similarities, model)
            found.append(one)
            total += value
        return found, total / (len(self.states) - 1)

    def _pair(
        self, family: Family, similarities: Mapping[str, Tensor | None], model: int
    ) -> tuple[Permutations, float]:
        outer = self.block(similarities[family.outer], model)
        elements = self.spec.groups[family.outer].size
        inner: dict[str, Matrix] = {}
        for name in family.inner:
            similarity = self.block(similarities[name], model)
            if similarity is not None:
                size = self.spec.groups[name].size
                inner[name] = similarity.reshape(elements, size, elements, size)  # (A, B, A, B)
        if inner:
            nested = match_nested(inner, outer, stay=not self.reference)
            inner_orders = {name: torch.from_numpy(order) for name, order in nested.inner.items()}
            return {family.outer: torch.from_numpy(nested.outer), **inner_orders}, nested.value
        if outer is None:
            return {}, 0.0
        columns, value = match(outer, stay=not self.reference)
        return {family.outer: torch.from_numpy(columns)}, value


class _Zip(_Align):
    whole = True

    def __init__(self, beta: float, budget: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.nested = frozenset(family.outer for family in self.families.values() if family.inner)
        self.beta, self.budget = beta, budget
        self.placed = self.clustered([self.spec.identity() for _ in self.states])

    def clustered(self, assignments: list[Permutations]) -> Clustered:
        """The clusters that the assignments describe."""
        return Clustered(self.spec, assignments, self.nested, PAPER_SMOOTHING if self.reference else 0.0)

    def pair_up(self, family: Family, similarities: Mapping[str, Tensor | None]) -> tuple[list[Permutations], float]:
        models = len(self.states)
        if not family.inner:
            whole = similarities[family.outer]
            if whole is None:
                return [{} for _ in self.states], 0.0
            zipped = self._zip(whole.float().cpu().numpy())
            # (models · units,) -> (models, units)
            return [{family.outer: part} for part in zipped[0].reshape(models, -1)], zipped[1]
        # Outer elements are matched one to one; their inner units are zipped over all models.
        orders, _ = super().pair_up(family, similarities)
        elements = self.spec.groups[family.outer].size
        orders[0] = {family.outer: torch.arange(elements)}
        found: list[Permutations] = [{family.outer: order[family.outer]} for order in orders]
        values = []
        for name in family.inner:
            similarity, size = similarities[name], self.spec.groups[name].size
            if similarity is None:
                continue
            numbers = np.ascontiguousarray(similarity.float().cpu().numpy())
            clusters = torch.zeros(models, elements, size, dtype=torch.long)  # (models, elements, size)
            for position in range(elements):
                units = np.concatenate(
                    [
                        (model * elements + int(orders[model][family.outer][position])) * size + np.arange(size)
                        for model in range(models)
                    ]
                )
                cluster, value = self._zip(numbers[np.ix_(units, units)])  # (models · size,)
                clusters[:, position] = cluster.reshape(models, size)
                values.append(value)
            for model in range(models):
                found[model][name] = clusters[model]
        return found, float(np.mean(values)) if values else 0.0

    def _zip(self, similarity: Similarities) -> tuple[Tensor, float]:
        zipped = zip_units(similarity, len(self.states), beta=self.beta, budget=self.budget)
        return torch.from_numpy(zipped.cluster), zipped.value
