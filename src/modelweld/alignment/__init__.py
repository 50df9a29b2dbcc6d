"""MuDSC applied to checkpoints: permute the experts of a merge to one order of units, and record the result.

`specs` derives and caches each architecture's symmetry, `models` checks it on every expert's real weights, `rows` draws
the rows that the models run on, `search` matches units by weights and activations, `scoring` evaluates values of alpha,
and `record` holds what is written. The engine then reads `views` of the checkpoints, whose units are in the common
order, and `batch_statistics` recomputes the running statistics of what it wrote. `cost` estimates all this beforehand;
`unit_similarity`, `plane` and `landscape` are for the report.

    with open_inputs(recipe) as inputs:
        found = align_inputs(recipe, build(recipe, inputs), inputs, root)
        ...  # execute the plan over found.inputs, into `tree`
        found.write(tree)
"""

from modelweld.alignment.aligning import align_inputs
from modelweld.alignment.batch_statistics import with_recomputed_statistics
from modelweld.alignment.record import ASSIGNMENTS, Aligned

__all__ = ["ASSIGNMENTS", "Aligned", "align_inputs", "with_recomputed_statistics"]
