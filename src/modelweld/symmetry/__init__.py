"""MuDSC: derive the permutation groups of a model, check them, match the units of models, align.

`derive` finds the groups from the exported graph (`atoms` are its pieces, `rules` its knowledge of operations). `spec`
holds and applies them, `invariance` checks that they preserve the function. `align` matches: over `families` of groups,
by `similarity` of weights and of what `observing` gathers of activations, with the solvers of `matching` and `zipping`
(compiled in `greedy`). `placements` applies assignments, `view` does so as a checkpoint is read, and `repair`
recomputes batch statistics.

    spec = derive_spec(model)
    found = align([one.state_dict(), other.state_dict()], spec)
    moved = spec.apply(other.state_dict(), found.permutations[1])
"""

from modelweld.symmetry.aligning import Alignment, Zipped, align, zip_models
from modelweld.symmetry.derive import derive_spec
from modelweld.symmetry.invariance import check_invariance
from modelweld.symmetry.spec import Factor, Group, Permutations, Spec

__all__ = [
    "Alignment",
    "Factor",
    "Group",
    "Permutations",
    "Spec",
    "Zipped",
    "align",
    "check_invariance",
    "derive_spec",
    "zip_models",
]
