"""From a recorded run to an MLflow version by pointer: a run with its scores, its parents, a pyfunc without weights.

Every step finds what an earlier, interrupted call left, and the version comes last and whole (its tags are created with
it): there is a version only when everything it refers to exists, and a second call finishes what the first began.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from modelweld.errors import InputError
from modelweld.formats.address import DvcAddress
from modelweld.formats.manifest import Manifest
from modelweld.formats.scores import MERGED, RegisteredScores, TaskScores
from modelweld.kinds import KINDS, ServedColumn
from modelweld.registry.connection import absent, connect, guarded, local_artifacts
from modelweld.registry.gate import mean_normalised, normalised
from modelweld.registry.prediction import ServedTask, served_columns
from modelweld.settings import cache_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

RECORD = "modelweld.record"
SCORES = "modelweld.scores"
MODEL_ID = "modelweld.model_id"
PARENT_DIGEST = "modelweld.parent_digest"
MODEL_TYPE = "modelweld.merged"
PARENT_TYPE = "modelweld.parent"
EXTERNAL = "mlflow.model.isExternal"
PARAM_LENGTH = 6000


@dataclass(frozen=True)
class Parent:
    """A model that went into the merge, as it was pinned. `files` maps each file to its SHA-256."""

    name: str
    source: str
    revision: str | None
    licence: str | None
    files: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """One digest for all files, as `sha256sum` prints them in the order of their names."""
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Equal for equal bytes from the same place: what decides whether MLflow knows this parent already."""
        return hashlib.sha256(f"{self.source}\0{self.revision}\0{self.sha256}".encode()).hexdigest()


@dataclass(frozen=True)
class Registration:
    """Everything MLflow is told about one recorded run.

    `record` is the run's tag and the key of idempotence; `documents` are the small files stored beside the metrics
    (manifest.json among them, byte for byte); `tasks` says for each head what is served.
    """

    name: str
    record: str
    recorded_at: datetime
    commit: str
    source_commit: str | None
    address: DvcAddress
    manifest: Manifest
    scores: Mapping[str, TaskScores]
    parents: tuple[Parent, ...]
    params: Mapping[str, Any]
    tasks: Mapping[str, ServedTask]
    lock_digest: str
    sources_digest: str
    documents: Mapping[str, str] = field(default_factory=dict)
    plots: tuple[Path, ...] = ()
    run_id: str | None = None
    dirty: bool = False


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of the registered model `name`; `created` is False when an earlier call had made it."""

    name: str
    version: int
    run_id: str
    record: str
    created: bool

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}/{self.version}"


def register(registration: Registration, tracking_uri: str) -> RegisteredVersion:
    """The version of this record, made now or by an earlier call.

    RegistryUnavailable when MLflow is not there, InputError for a merge that is no model by itself.
    """
    _require_whole(registration)
    client = connect(tracking_uri)
    with guarded(tracking_uri), _one_at_a_time(tracking_uri, registration.name):
        found = find_version(client, registration.name, registration.record)
        if found is not None:
            _finish(client, found.run_id)
            return _registered(found, registration.record, created=False)
        run = _run(client, registration, _experiment(client, tracking_uri, registration.name))
        _log(client, run, registration)
        parents = _log_parents(client, run, registration.parents)
        model_id = _log_pointer(client, run, registration)
        source = _source(client, tracking_uri, model_id)
        made = _create_version(client, run, registration, source, model_id, parents)
        _finish(client, run.info.run_id)
        return _registered(made, registration.record, created=True)


def _require_whole(registration: Registration) -> None:
    if (registration.manifest.recipe.output or {}).get("adapter") == "keep":
        raise InputError(
            "the merge was kept as an adapter, and a version has to serve without its base",
            where=registration.record,
            hint="merge with `output: {adapter: fold}` to register it, or run with --no-register",
        )


def find_version(client: MlflowClient, name: str, record: str) -> ModelVersion | None:
    """The version registered from a record, if there is one (the oldest, should two machines have raced)."""
    found = client.search_model_versions(f"name = '{name}' and tag.`{RECORD}` = '{record}'")
    return min(found, key=lambda item: int(item.version), default=None)


def _one_at_a_time(uri: str, name: str) -> FileLock:
    # Two registrations of one record on one machine must not both find nothing.
    key = hashlib.sha256(f"{uri}\0{name}".encode()).hexdigest()[:16]
    locks = cache_directory() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"register-{key}.lock")


def _registered(found: ModelVersion, record: str, *, created: bool) -> RegisteredVersion:
    return RegisteredVersion(found.name, int(found.version), found.run_id, record, created)


def _finish(client: MlflowClient, run_id: str) -> None:
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, status="FINISHED")


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=local_artifacts(uri, name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _run(client: MlflowClient, registration: Registration, experiment: str) -> Run:
    found = client.search_runs([experiment], f"tags.`{RECORD}` = '{registration.record}'", max_results=1)
    if found:
        return found[0]
    short = registration.record.rsplit("/", 1)[-1]
    return client.create_run(experiment, run_name=short, tags=_describe(registration))


def _log(client: MlflowClient, run: Run, registration: Registration) -> None:
    from mlflow.entities import Metric, Param

    run_id = run.info.run_id
    params = [Param(key, value[:PARAM_LENGTH]) for key, value in sorted(_flatten(registration.params).items())]
    # The record's own time: a repeated call writes the same points again instead of new ones.
    at = int(registration.recorded_at.timestamp() * 1000)
    metrics = [Metric(key, value, at, 0) for key, value in sorted(_metrics(registration.scores).items())]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    with tempfile.TemporaryDirectory(prefix="modelweld-") as folder:
        for name, text in registration.documents.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="")
        client.log_artifacts(run_id, folder)
    for plot in registration.plots:
        client.log_artifact(run_id, str(plot), "plots")


def _log_parents(client: MlflowClient, run: Run, parents: tuple[Parent, ...]) -> dict[str, str]:
    from mlflow.entities import LoggedModelInput

    models = {parent.name: _parent(client, run, parent) for parent in parents}
    known = {item.model_id for item in client.get_run(run.info.run_id).inputs.model_inputs}
    new = [LoggedModelInput(model_id=model_id) for model_id in dict.fromkeys(models.values()) if model_id not in known]
    if new:
        client.log_inputs(run.info.run_id, models=new)
    return models


def _parent(client: MlflowClient, run: Run, parent: Parent) -> str:
    from mlflow.entities import LoggedModelStatus

    experiments = [item.experiment_id for item in client.search_experiments()]
    found = client.search_logged_models(experiments, filter_string=f"tags.`{PARENT_DIGEST}` = '{parent.identity}'")
    ready = [model for model in found if model.status == LoggedModelStatus.READY]
    if ready:
        return str(ready[0].model_id)
    made = client.create_logged_model(
        run.info.experiment_id,
        name=parent.name,
        tags={PARENT_DIGEST: parent.identity, EXTERNAL: "true"},
        params={
            "source": parent.source[:PARAM_LENGTH],
            "revision": parent.revision or "",
            "licence": parent.licence or "",
            "sha256": parent.sha256,
        },
        model_type=PARENT_TYPE,
    )
    return str(client.finalize_logged_model(made.model_id, LoggedModelStatus.READY).model_id)


def _log_pointer(client: MlflowClient, run: Run, registration: Registration) -> str:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment, run_id = run.info.experiment_id, run.info.run_id
    found = client.search_logged_models([experiment], filter_string=f"tags.`{RECORD}` = '{registration.record}'")
    ready = [model for model in found if model.status == LoggedModelStatus.READY]
    if ready:
        model_id = str(ready[0].model_id)
    else:
        made = client.create_logged_model(
            experiment,
            name=registration.name,
            source_run_id=run_id,
            tags={RECORD: registration.record},
            params=registration.address.tags(),
            model_type=MODEL_TYPE,
        )
        with tempfile.TemporaryDirectory(prefix="modelweld-") as folder:
            target = Path(folder) / "pointer"
            _save_pointer(target, registration, run_id, made.model_id)
            client.log_model_artifacts(made.model_id, str(target))
        model_id = str(client.finalize_logged_model(made.model_id, LoggedModelStatus.READY).model_id)
    logged = {item.model_id for item in client.get_run(run_id).outputs.model_outputs}
    if model_id not in logged:
        client.log_outputs(run_id, models=[LoggedModelOutput(model_id=model_id, step=0)])
    return model_id


def _save_pointer(target: Path, registration: Registration, run_id: str, model_id: str) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ParamSchema, ParamSpec

    inputs, outputs = served_columns(registration.tasks)
    signature = ModelSignature(
        inputs=_schema(inputs) if inputs else None,
        outputs=_schema(outputs),
        params=ParamSchema([ParamSpec("task", "string", None)]),
    )
    config = {
        "dvc": registration.address.data(),
        "tasks": {task: served.to_config() for task, served in registration.tasks.items()},
        "record": registration.record,
    }
    with warnings.catch_warnings():
        # MLflow asks for type hints and an input example, both of which would make it load the weights.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            model_config=config,
            pip_requirements=[f"modelweld=={package_version('modelweld')}"],
            signature=signature,
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            metadata={"input": "; ".join(_served_inputs(registration.tasks))},
            input_example=_example(registration.tasks),
        )


def _schema(columns: Sequence[ServedColumn]) -> Any:
    from mlflow.types.schema import AnyType, ColSpec, Schema

    return Schema([ColSpec(AnyType() if column.type == "any" else column.type, column.name) for column in columns])


def _served_inputs(tasks: Mapping[str, ServedTask]) -> list[str]:
    return [KINDS[name].served_as for name in sorted({task.kind for task in tasks.values()})]


def _example(tasks: Mapping[str, ServedTask]) -> Any:
    """One row that every head takes; None where the kinds have none, or not the same."""
    import pandas

    examples = [KINDS[name].served_example for name in {task.kind for task in tasks.values()}]
    alike = examples and all(example == examples[0] for example in examples)
    return pandas.DataFrame([examples[0]]) if alike and examples[0] else None


def _source(client: MlflowClient, uri: str, model_id: str) -> str:
    """What the version names as its source."""
    if uri.startswith(("http://", "https://")):
        return f"models:/{model_id}"
    # Without a server MLflow looks `models:/…` up in the process's global tracking URI, which may be another one.
    return str(client.get_logged_model(model_id).artifact_location)


def _create_version(
    client: MlflowClient,
    run: Run,
    registration: Registration,
    source: str,
    model_id: str,
    parents: Mapping[str, str],
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(registration.name)
    except MlflowException as error:
        if not absent(error):
            raise
        client.create_registered_model(registration.name, description="Merged by modelweld; the weights are in DVC.")
    tags = _describe(registration) | {MODEL_ID: model_id, "modelweld.parents": json.dumps(parents, sort_keys=True)}
    return client.create_model_version(
        registration.name,
        source=source,
        run_id=run.info.run_id,
        model_id=model_id,
        tags=tags,
        description=f"{registration.record} at {registration.address}",
    )


def _describe(registration: Registration) -> dict[str, str]:
    merge = registration.params.get("merge", {})
    mean = mean_normalised(registration.scores)
    licences = sorted({parent.licence for parent in registration.parents if parent.licence})
    tags = {
        RECORD: registration.record,
        "modelweld.run_id": registration.run_id,
        "modelweld.commit": registration.commit,
        "modelweld.source_commit": registration.source_commit,
        "modelweld.dirty": "true" if registration.dirty else "false",
        "modelweld.lock_digest": registration.lock_digest,
        "modelweld.sources_digest": registration.sources_digest,
        "modelweld.method": merge.get("method") if isinstance(merge, Mapping) else None,
        "modelweld.tasks": ",".join(sorted(registration.tasks)),
        "modelweld.licences": ", ".join(licences),
        "modelweld.mean_normalised": None if mean is None else f"{mean:.6f}",
        "modelweld.version": package_version("modelweld"),
        SCORES: _condensed(registration.scores),
        **registration.address.tags(),
    }
    return {key: value for key, value in tags.items() if value}


def _condensed(scores: Mapping[str, TaskScores]) -> str:
    kept = {task: RegisteredScores.of(one).data() for task, one in scores.items()}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _metrics(scores: Mapping[str, TaskScores]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for task, one in scores.items():
        for system, found in one.systems.items():
            metrics[f"{task}/{system}.accuracy"] = found.accuracy.value
            metrics[f"{task}/{system}.macro_f1"] = found.macro_f1.value
            metrics[f"{task}/{system}.normalised"] = found.normalised
    relative = [value for one in scores.values() if (value := normalised(one)) is not None]
    if relative:
        metrics[f"{MERGED}.mean_normalised"] = sum(relative) / len(relative)
        metrics[f"{MERGED}.worst_normalised"] = min(relative)
    return metrics


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item, default=str)
    return flat
