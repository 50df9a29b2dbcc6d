"""params.yaml as frozen models: sources, tasks, thresholds, the recipe and its baselines, evaluation, the gate."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from modelweld.config.align import Align, Rows
from modelweld.config.recipe import AnyRecipe, ExpertEntry, Name, Recipe
from modelweld.config.strict import Strict
from modelweld.hardware import Request
from modelweld.kinds import DEFAULT, KINDS, ROLES, KindName, MetricName


class SourceEntry(Strict):
    """Where something comes from: `hf://org/name@rev`, `models:/name@alias`, `s3://…` (any fsspec URL), or a path."""

    uri: str
    licence: str | None = None
    allow_pickle: bool = False


class Task(Strict):
    """What one expert was finetuned for, and how it is evaluated. The key in `tasks:` is the head's name."""

    model: Name
    dataset: Name
    kind: KindName = DEFAULT
    text: str = Field("text", description="column of texts; for text-classification")
    image: str = Field("image", description="column of images, encoded or as arrays; for image-classification")
    label: str = "label"
    columns: dict[str, str] = Field(
        default_factory=dict,
        description=f"columns by role, where they are not named as their role; roles: {', '.join(ROLES)}",
    )
    split: str = "test"
    train_split: str | None = Field("train", description="checked for leakage into `split`; null when there is none")
    max_length: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def _roles_are_of_the_kind(self) -> Self:
        roles = KINDS[self.kind].roles
        for role in self.columns:
            if role not in roles:
                raise ValueError(f"columns: {self.kind} has no {role!r}, only {', '.join(roles)}")
            if role in self.model_fields_set and getattr(self, role) != self.columns[role]:
                raise ValueError(f"columns.{role} and {role} name two columns")
        return self

    @property
    def columns_by_role(self) -> dict[str, str]:
        """The column of every role that the kind has."""
        return {role: self.columns.get(role, getattr(self, role, role)) for role in KINDS[self.kind].roles}

    def rows(self, dataset: str, split: str) -> Rows:
        """A split of the task's data set, as an alignment names rows."""
        columns = self.columns_by_role
        named = {role: columns.pop(role) for role in ("text", "image", "label") if role in columns}
        rows = Rows(dataset=dataset, split=split, columns=columns, **named)
        # Rows of a kind that their columns already tell are written without it.
        return rows if rows.task_kind == self.kind else rows.model_copy(update={"kind": self.kind})


class Validate(Strict):
    """Thresholds of the weight and data gates."""

    max_relative_delta: Annotated[float, Field(gt=0)] = Field(
        0.5,
        description="largest ||W - W_base|| / ||W_base|| over a model's matrices before it is no finetune of this base",
    )
    max_leakage: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of test rows found in train")
    max_duplicates: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of duplicated test rows")
    min_rows: Annotated[int, Field(ge=1)] = 50
    verify_digests: bool = Field(
        True, description="read every fetched file once more and compare it with its pinned SHA-256, not its size alone"
    )


class Evaluate(Strict):
    """How predictions are made and how sure their scores are."""

    batch_tokens: Annotated[int, Field(ge=1)] = Field(16_384, description="tokens of a batch at most, padding included")
    precision: Request = Field(
        "float32",
        description="of matrix products; half precision is used only where this machine is measured to be faster in "
        "it, unless it ends in `!`",
    )
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0
    metric: MetricName = "accuracy"

    def with_metric(self, metric: str) -> Self:
        """The same settings with another metric, checked."""
        return self.model_validate(self.model_dump() | {"metric": metric})


class Register(Strict):
    """The gate in front of the `challenger` alias."""

    min_relative: Annotated[float, Field(ge=0)] = Field(
        0.7, description="every task must score at least this fraction of its expert"
    )
    champion_margin: float = Field(0.0, description="the mean may fall short of the champion's by this much")


class Params(Strict):
    """The whole of params.yaml. DVC reads it too: a section that a stage depends on has to stand there, if only {}."""

    model_config = ConfigDict(defer_build=True)

    name: Name
    models: dict[Name, SourceEntry]
    datasets: dict[Name, SourceEntry]
    tasks: dict[Name, Task]
    validate_: Validate = Field(alias="validate")
    merge: AnyRecipe
    baselines: dict[Name, AnyRecipe]
    evaluate: Evaluate
    register_: Register = Field(Register(), alias="register")

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        if "base" not in self.models:
            raise ValueError("models: needs an entry named 'base'")
        for task, spec in self.tasks.items():
            if spec.model not in self.models or spec.model == "base":
                raise ValueError(f"tasks.{task}.model: no expert named {spec.model!r} in models")
            if spec.dataset not in self.datasets:
                raise ValueError(f"tasks.{task}.dataset: no dataset named {spec.dataset!r} in datasets")
            metrics = [metric.name for metric in KINDS[spec.kind].metrics]
            if self.evaluate.metric not in metrics:
                raise ValueError(f"evaluate.metric: {spec.kind} (tasks.{task}) is scored by {', '.join(metrics)}")
        for key, recipe in {"merge": self.merge, **{f"baselines.{k}": v for k, v in self.baselines.items()}}.items():
            for expert in recipe.models or {}:
                if expert not in self.models:
                    raise ValueError(f"{key}.models: no expert named {expert!r} in models")
        return self

    def recipe(self, baseline: str | None = None) -> Recipe:
        """The merge recipe (or that of a baseline) with the pipeline's paths filled in: models/<name>."""
        chosen: Recipe = self.baselines[baseline] if baseline else self.merge
        tasks = {spec.model: task for task, spec in self.tasks.items()}
        names = list(chosen.models) if chosen.models else [name for name in self.models if name != "base"]
        entries = {
            name: ExpertEntry(
                path=f"models/{name}",
                weight=(chosen.models or {}).get(name, ExpertEntry()).weight,
                task=tasks.get(name),
            )
            for name in names
        }
        align = self._rows(chosen.alignment) if chosen.alignment is not None else None
        return chosen.model_copy(update={"base": "models/base", "models": entries, "align": align})

    def _rows(self, align: Align) -> Align:
        """The settings with the tasks' own rows where none are named: train to calibrate, validation to choose."""

        def of(task: Task, split: str) -> Rows:
            return task.rows(f"datasets/{task.dataset}", split)

        # Rows that nothing needs are not read: weights alone match units, and most models have no batch statistics.
        train = {name: of(task, task.train_split) for name, task in self.tasks.items() if task.train_split}
        calibrated = align.calibration or train or None
        validation = {name: of(task, "validation") for name, task in self.tasks.items()}
        chosen = align.validation or (validation if align.alpha == "auto" else None)
        return align.model_copy(update={"calibration": calibrated, "validation": chosen})
