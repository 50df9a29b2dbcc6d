"""Bring the experts of a merge to one order of units, and say what that did.

`members` proves each expert's symmetry on its real weights, `rows` draws what the models are run on, `search` matches
units by weights and activations, `scoring` tries a value of alpha, `record` is what is written of all this. The engine
then gets `views` of the checkpoints in which every unit stands in its place, and `repairing` recomputes the batch
statistics of what it wrote.

    with open_inputs(recipe) as inputs:
        found = aligned(recipe, build(recipe, inputs), inputs, root)
        ...  # execute the plan over found.inputs, into `tree`
        found.write(tree)
"""

from modelweld.alignment.aligning import aligned
from modelweld.alignment.batch_statistics import repaired
from modelweld.alignment.record import DOCUMENT, PLACES, Aligned

__all__ = ["DOCUMENT", "PLACES", "Aligned", "aligned", "repaired"]
