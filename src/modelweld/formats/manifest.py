"""manifest.json of a merged directory: what it is and what it was made from, without clock, host, user or path."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue

from modelweld.errors import CheckpointError
from modelweld.formats.alignment import CalibrationRows, Mode
from modelweld.formats.document import Document, Layout, Part
from modelweld.formats.lock import PinnedFile

FILE = "manifest.json"


class RecipeModel(Part):
    """One expert's weight in the recipe, and the task of its head."""

    weight: float
    task: str | None


class ManifestRecipe(Part):
    """The recipe as resolved. Further keys are the parameters of its method, as modelweld.config has them."""

    model_config = ConfigDict(extra="allow")

    method: str
    models: dict[str, RecipeModel]
    order: tuple[str, ...]
    align: dict[str, JsonValue] | None = None
    output: dict[str, JsonValue] | None = None


class MethodVersion(Part):
    """The version of a method's arithmetic; of a method that a package brings, also that package and its version."""

    OMITTED: ClassVar = frozenset({"package", "package_version"})

    version: str
    package: str | None = None
    package_version: str | None = None


class ParentSource(Part):
    """Where a parent came from, as it was pinned."""

    uri: str
    resolved: str
    revision: str | None
    licence: str | None
    files: dict[str, PinnedFile]


class Parent(Part):
    """A model that was merged: where it came from (None when it was not pinned), and the digest of each tensor read."""

    source: ParentSource | None
    tensors: dict[str, str]


class ExpertParent(Parent):
    """An expert: how it was weighed, how its names differ from the reference's, the task whose head it gave.

    `adapter` is its adapter_config.json, where it is an adapter.
    """

    OMITTED: ClassVar = frozenset({"adapter"})

    weight: float
    task: str | None
    prefix: str
    head: str | None
    adapter: dict[str, JsonValue] | None = None


class Parents(Part):
    """The base, where there is one, and the experts by their labels."""

    base: Parent | None
    experts: dict[str, ExpertParent]


class FactorOf(Part):
    """The tensor whose merged delta a tensor of an adapter is a factor of."""

    tensor: str
    shape: tuple[int, ...]
    factor: Literal["A", "B"]


class Packed(Part):
    """How a packed weight was split into projections, which were merged one by one."""

    groups: int
    sizes: tuple[int, ...]


class MergedTensor(Part):
    """One tensor of the output. Further keys are figures that its method gives, such as `rank` and `kept_share`.

    `delta_norm` is the norm of what was merged into the base, `delta_survival` the share of it that rounding left;
    `device` is there when an accelerator's memory ran out and the tensor was merged on the processor.
    """

    model_config = ConfigDict(extra="allow")
    OMITTED: ClassVar = frozenset({"stored_transposed", "route", "factor_of", "packed", "device"})
    __pydantic_extra__: dict[str, float | int | str]

    action: Literal["merge", "copy"]
    role: str
    method: str | None
    reason: str
    shape: tuple[int, ...]
    dtype: str
    source_dtype: str
    parameters: dict[str, JsonValue] | None
    stored_transposed: Literal[True] | None = None
    route: str | None = None
    factor_of: FactorOf | None = None
    packed: Packed | None = None
    digest: str
    delta_survival: float | None
    delta_norm: float | None
    device: Literal["cpu"] | None = None

    def figure(self, name: str) -> float | int | str | None:
        """A figure that the method gave, `delta_survival` among them; None where there is none."""
        return self.delta_survival if name == "delta_survival" else self.__pydantic_extra__.get(name)


class Head(Part):
    """One task's head: the expert it is from, and the digest of each tensor."""

    model: str
    tensors: dict[str, str]


class SideFiles(Part):
    """The files beside the weights: the model they are from, and the dtype that every config.json names."""

    from_: str = Field(alias="from")
    files: tuple[str, ...]
    config_dtype: str | None


class Environment(Part):
    """What the arithmetic ran on. Threads and devices change no byte of most merges; versions of packages may."""

    packages: dict[str, str]
    device: str
    arithmetic: str
    torch_threads: int


class Survival(Part):
    """The share of the merged delta that rounding left: over the whole model by norm, and in the worst tensor."""

    whole_model: float
    worst_tensor: float


class OutputFile(Part):
    """One file: a shard of weights by the digest of its header and tensors, another by that of its bytes."""

    OMITTED: ClassVar = frozenset({"tensors_blake3", "blake3", "sha256"})

    size_bytes: int
    tensors_blake3: str | None = None
    blake3: str | None = None
    sha256: str | None = None


class Output(Part):
    """`model_digest` is over the weights alone, however they are sharded; `files` are all but this one and the card."""

    model_digest: str
    files: dict[str, OutputFile]


class AlignmentSummary(Part):
    """What alignment.json says, in short. `digest` is over what was matched to what."""

    mode: Mode
    alpha: float | None
    alpha_curve: dict[str, float] | None
    alpha_scored_by: str | None
    objective: float | None
    identity_share: float
    aligned_already: bool
    order_of: str
    folded: tuple[str, ...]
    calibration: CalibrationRows | None
    proof_error: dict[str, float]
    preservation_error: dict[str, float]
    digest: str


class Repair(Part):
    """Batch statistics that were computed again: of how many layers, on which rows."""

    rows: int
    digest: str
    layers: int


class Manifest(Document):
    """One canonical document: equal merges have equal manifests, and every other lineage format is derived from it.

    `alignment` and `repair` are there when the recipe asks for an alignment.
    """

    NAME: ClassVar = "manifest of a merge"
    VERSION_KEY: ClassVar = "schema"
    READS: ClassVar = ("modelweld.manifest/1",)
    LAYOUT: ClassVar = Layout(indent=1)
    ERROR: ClassVar = CheckpointError
    HINT: ClassVar = "merge again"
    OMITTED: ClassVar = frozenset({"alignment", "repair"})

    schema_: Literal["modelweld.manifest/1"] = Field("modelweld.manifest/1", alias="schema")
    recipe: ManifestRecipe
    methods: dict[str, MethodVersion]
    parents: Parents
    tensors: dict[str, MergedTensor]
    heads: dict[str, Head]
    left_out: dict[str, str]
    side_files: SideFiles
    notes: tuple[str, ...]
    environment: Environment
    delta_survival: Survival | None
    output: Output
    alignment: AlignmentSummary | None = None
    repair: Repair | None = None

    def data(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        document = super().data()
        if self.alignment is not None:
            document.setdefault("repair", None)
        return document

    @property
    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
