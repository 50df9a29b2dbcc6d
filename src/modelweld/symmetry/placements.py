"""Assignments of units: one permutation per model (align), or clusters over all models (zip).

Both give each tensor in the common order, in which a matched set of models is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelweld.symmetry.spec import Factor, Outside, Permutations, Spec, leaves, length, walk


@dataclass
class Permuted:
    """One set of permutations per model."""

    spec: Spec
    assignments: list[Permutations]

    def tensor(self, name: str, tensor: Tensor, model: int, *, but: tuple[str, ...] = ()) -> Tensor:
        """The tensor in model 0's order."""
        if not but:
            return self.spec.apply_to(name, tensor, self.assignments[model])
        still = self.spec.identity(but)
        return self.spec.apply_to(name, tensor, {**self.assignments[model], **still})

    def copy(self) -> Permuted:
        return Permuted(self.spec, [dict(moved) for moved in self.assignments])


@dataclass
class Clustered:
    """For each model and group the cluster that every unit is assigned to.

    `assignments[model][group]` has the shape of the group's permutations: for an inner group, row a belongs to the
    outer element that is now at position a. Outer groups of nested families hold permutations (old by new), others old
    to new. `smoothing` is added to the number of units in a cluster.
    """

    spec: Spec
    assignments: list[Permutations]
    nested: frozenset[str] = field(default_factory=frozenset)
    smoothing: float = 0.0

    def tensor(self, name: str, tensor: Tensor, model: int, *, but: tuple[str, ...] = ()) -> Tensor:
        """The tensor with its units summed by cluster; on axes that give out units, averaged.

        While a family is being matched (`but` names it), its neighbours are averaged where they take units in instead:
        so the paper's code compares units, and its matchings are only found this way.
        """
        axes = self.spec.axes.get(name, ())
        outside = [self.spec.outside(name, dim) for dim in range(len(axes))]
        # Inner units of elements on another axis go first: the elements are then still at their old positions.
        for dim in sorted(range(len(axes)), key=lambda dim: outside[dim] is None):
            factors, outer = axes[dim], outside[dim]
            if not any(factor.group and factor.group not in but for factor in leaves(factors)):
                continue
            tensor = self._sum_clusters(tensor, dim, factors, model, but, outer)
            if ((name, dim) in self.spec.reads) == bool(but):
                share = len(self.assignments) / self._count(factors, but, outer).to(tensor)
                shape = [1] * tensor.ndim
                shape[dim] = -1
                if outer is not None:
                    # One row of counts per element.
                    shape[outer.dim] = len(share)
                    share = share[self._targets(outer.group, model, but)]
                    share = share if outer.dim < dim else share.T
                tensor *= share.reshape(shape)  # (1, …, length, …, 1), or (1, …, elements, …, length, …, 1)
        return tensor

    def copy(self) -> Clustered:
        return Clustered(self.spec, [dict(found) for found in self.assignments], self.nested, self.smoothing)

    def destination(
        self, factors: tuple[Factor, ...], model: int, but: tuple[str, ...] = (), outer: str | None = None
    ) -> Tensor:
        """For each old position of an axis, the new one: shape (length,).

        With `outer`, a group on another axis that this one lies inside of: (elements of outer in old order, length).
        """

        def step(factor: Factor, positions: Tensor, outer_index: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            if factor.group is None or factor.group in but:
                return positions, positions
            group = self.spec.groups[factor.group]
            if group.within:
                target = self.assignments[model][group.name][outer_index[group.within[0]], positions]
            else:
                target = self._targets(group.name, model, but)[positions]
            return target, target

        if outer is None:
            return walk(factors, step, {})[0]
        targets = self._targets(outer, model, but)
        return walk(factors, step, {outer: targets}, len(targets))

    def _targets(self, outer: str, model: int, but: tuple[str, ...]) -> Tensor:
        found = self.assignments[model][outer]
        if outer in but:
            return torch.arange(len(found))
        return found.argsort() if outer in self.nested else found

    def _sum_clusters(
        self,
        tensor: Tensor,
        dim: int,
        factors: tuple[Factor, ...],
        model: int,
        but: tuple[str, ...],
        outer: Outside | None,
    ) -> Tensor:
        sums = torch.zeros_like(tensor)
        if outer is None:
            return sums.index_add_(dim, self.destination(factors, model, but).to(tensor.device), tensor)
        targets = self.destination(factors, model, but, outer.group).to(tensor.device)  # (elements, length)
        along = dim - (outer.dim < dim)
        for element, row in enumerate(targets):
            sums.select(outer.dim, element).index_add_(along, row, tensor.select(outer.dim, element))
        return sums

    def _count(self, factors: tuple[Factor, ...], but: tuple[str, ...], outer: Outside | None) -> Tensor:
        """How many units of all models are assigned to each position: (length,), or (elements in new order, length)."""
        name = None if outer is None else outer.group
        size = length(factors)
        count = torch.zeros(1 if name is None else self.spec.groups[name].size, size)  # (elements or 1, length)
        for model in range(len(self.assignments)):
            targets = self.destination(factors, model, but, name).reshape(-1, size)  # (elements or 1, length)
            at = torch.zeros(1, dtype=torch.long) if name is None else self._targets(name, model, but)
            count.index_put_((at[:, None].expand_as(targets), targets), torch.ones(()), accumulate=True)
        # No cluster is empty; the paper's code guards against it all the same, which changes its matchings.
        count += self.smoothing
        return count[0] if name is None else count
