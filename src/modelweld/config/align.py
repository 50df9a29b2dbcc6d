"""The `align:` section of a recipe: how the experts' units are permuted to one order before they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from modelweld.config.addresses import below
from modelweld.config.methods import Share
from modelweld.config.strict import Strict
from modelweld.kinds import DEFAULT, KindName, implied_by


class Rows(Strict):
    """One split of a data set: a folder of <split>.parquet (csv, jsonl), or such a file, and its columns."""

    dataset: str
    split: str = "train"
    text: str = Field("text", description="column of texts, unless `image` names one of images")
    image: str | None = Field(None, description="column of images: the rows are then images")
    label: str = Field("label", description="column of labels; calibration rows need none")
    kind: KindName | None = Field(None, description="of the task that has these rows; null is told by the columns")
    columns: dict[str, str] = Field(default_factory=dict, description="columns of other roles, by role")

    @property
    def task_kind(self) -> str:
        """The kind of task that these rows are of."""
        return self.kind or implied_by(self.columns_by_role) or DEFAULT

    @property
    def columns_by_role(self) -> dict[str, str]:
        """The columns that are named."""
        columns = {"text": self.text, "image": self.image, "label": self.label, **self.columns}
        return {role: column for role, column in columns.items() if column is not None}

    @model_serializer(mode="wrap")
    def _without_what_is_not_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Manifests and records hold these rows. In 0.1.0 they had neither key, and must be the same when made again.
        document: dict[str, Any] = dump(self)
        return {key: value for key, value in document.items() if value or key not in ("kind", "columns")}


class Align(Strict):
    """How units are matched (MuDSC, arXiv 2403.01753). In a pipeline the rows come from the tasks' own data sets."""

    mode: Literal["align", "zip", "none"] = Field(
        "align",
        description="permute every model to the first one's order, merge similar units of all models (zip), or leave "
        "all units where they are (none), for `repair` alone",
    )
    space: Literal["dual", "weights", "activations"] | None = Field(
        None, description="what similarity is read from; null is dual where there are calibration rows, else weights"
    )
    alpha: Share | Literal["auto"] = Field(
        0.5, description="similarity is alpha * weights + (1 - alpha) * activations; auto tries `grid` on `validation`"
    )
    grid: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    seed: int = 0
    patience: Annotated[int, Field(ge=1)] = 5
    sweeps: Annotated[int, Field(ge=1)] = 100
    beta: Share = Field(
        0.5,
        validation_alias=AliasChoices("beta", "inside"),
        description="zip: what the similarity of a merged unit is multiplied by; `inside` is its deprecated name",
    )
    budget: Share = Field(1.0, description="zip: the share of merges that may join two units of one model")
    spec: str | None = Field(None, description="a symmetry spec file, for architectures that cannot be derived")
    calibration: dict[str, Rows] | None = Field(
        None, description="rows that all models are run on, by any name; in a pipeline the tasks' train splits"
    )
    rows: Annotated[int, Field(ge=2)] = Field(256, description="calibration rows, drawn evenly and by the seed")
    validation: dict[str, Rows] | None = Field(
        None, description="labelled rows by task that alpha is chosen on; in a pipeline the tasks' `validation` splits"
    )
    validation_rows: Annotated[int, Field(ge=1)] = 500
    max_length: Annotated[int, Field(ge=1)] = 128
    repair: bool | None = Field(
        None,
        description="recompute BatchNorm statistics of the merge on the calibration rows; null does so where there "
        "are both",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.space == "weights" and self.alpha == "auto":
            raise ValueError("alpha: auto weighs weights against activations, and space: weights leaves those out")
        return self

    def rooted(self, root: Path) -> Self:
        """The same settings with their relative paths taken from `root`; absolute ones and addresses stay."""

        def rows(named: dict[str, Rows] | None) -> dict[str, Rows] | None:
            return named and {
                name: entry.model_copy(update={"dataset": below(root, entry.dataset)}) for name, entry in named.items()
            }

        spec = self.spec and below(root, self.spec)
        return self.model_copy(
            update={"spec": spec, "calibration": rows(self.calibration), "validation": rows(self.validation)}
        )
