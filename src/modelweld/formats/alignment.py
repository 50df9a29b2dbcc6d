"""alignment.json of a merged directory: how the units of its experts were brought to one order, and what it gave."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelweld.errors import CheckpointError
from modelweld.formats.document import Document, Layout, Part

FILE = "alignment.json"

Mode = Literal["align", "zip", "none"]


class UnitGroup(Part):
    """Units that move together. `matched` is the mean similarity of counterparts, where they were matched at all."""

    size: int
    within: tuple[str, ...]
    matched: float | None
    identity_share: float


class CalibrationRows(Part):
    """The rows that the models were run on: how many, from which sets, and the digest of their contents."""

    rows: int
    sets: tuple[str, ...]
    digest: str


class MatchedMeans(Part):
    """The mean similarity of counterparts, in the models' own orders and in the common one."""

    before: float
    after: float


class ShownSimilarity(Part):
    """Similarities (units × units) of some of one group's units, of the first model to the second."""

    group: str
    models: tuple[str, ...]
    units: tuple[int, ...]
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]
    matched: MatchedMeans


class AlignmentRecord(Document):
    """What was done and what it gave, without clocks. Fields are None or empty where nothing was matched.

    `alpha_curve` has the score of every alpha that was tried, by its shortest spelling. `order_of` names the model
    whose order is the common one. Errors are relative changes of outputs under the permutations.
    """

    NAME: ClassVar = "record of an alignment"
    READS: ClassVar = (1,)
    LAYOUT: ClassVar = Layout(indent=1)
    ERROR: ClassVar = CheckpointError
    HINT: ClassVar = "merge again"

    version: Literal[1] = 1
    mode: Mode
    alpha: float | None = None
    alpha_curve: dict[str, float] | None = None
    alpha_scored_by: str | None = None
    models: tuple[str, ...]
    order_of: str
    folded: tuple[str, ...] = ()
    objective: float | None = None
    trace: tuple[float, ...] = ()
    identity_share: float
    aligned_already: bool
    groups: dict[str, UnitGroup] = Field(default_factory=dict)
    symmetry_digest: str | None = None
    proof_error: dict[str, float] = Field(default_factory=dict)
    preservation_error: dict[str, float] = Field(default_factory=dict)
    calibration: CalibrationRows | None = None
    similarity: tuple[ShownSimilarity, ...] = ()
