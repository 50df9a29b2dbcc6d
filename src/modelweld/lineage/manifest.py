"""The merge manifest: what a merged directory is and what it was made from.

`build` gathers it from a finished merge, `verify` compares a directory with it. modelweld.formats.manifest has its
fields. It holds no clock, host, user, absolute path or commit, so that equal merges have equal manifests, byte for
byte. Every other lineage format is derived from it. `model_digest` identifies the weights alone: sharding does not
change it.

    found = read(Path("merged"))
    print(found.digest, found.output.model_digest)
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from modelweld.checkpoints import Checkpoint, file_sha256, tensor_digest
from modelweld.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from modelweld.checkpoints.digests import file_blake3, holds, shard_digest
from modelweld.checkpoints.loading import HEAD_WEIGHTS, HEADS
from modelweld.config import Recipe
from modelweld.config.align import Align
from modelweld.engine.execute import Execution
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan, TensorPlan
from modelweld.formats.lock import Pinned
from modelweld.formats.manifest import (
    FILE,
    AlignmentSummary,
    Environment,
    ExpertParent,
    Head,
    Manifest,
    ManifestRecipe,
    MergedTensor,
    MethodVersion,
    Output,
    OutputFile,
    Parent,
    Parents,
    ParentSource,
    Repair,
    SideFiles,
    Survival,
)
from modelweld.methods.registry import provenance

_PACKAGES = ("modelweld", "torch", "numpy", "safetensors")


def build(
    recipe: Recipe,
    plan: Plan,
    inputs: Inputs,
    execution: Execution,
    tree: Path,
    *,
    device: str,
    sources: Mapping[str, Pinned] | None = None,
    sha256: bool = False,
    alignment: AlignmentSummary | None = None,
    repair: Repair | None = None,
) -> Manifest:
    """The manifest of the merge in `tree`.

    `sources` are the pinned entries of the parents by label (`base` and the experts'), from sources.lock.json; with
    `sha256` the output files carry that digest too, at the price of reading them once more. `alignment` and `repair`
    are those of a recipe with `align:`.
    """
    heads = {head.task: _head(tree / HEADS / head.task, head.model) for head in plan.heads}
    tensors = {tensor.name: _tensor(tensor, execution.finished[tensor.name]) for tensor in plan.tensors}
    used = sorted({tensor.method for tensor in plan.tensors if tensor.method})
    return Manifest(
        recipe=_recipe(recipe),
        methods={name: MethodVersion(**provenance(name)) for name in used},
        parents=_parents(inputs, execution, heads, sources or {}),
        tensors=tensors,
        heads=heads,
        left_out=dict(plan.left_out),
        side_files=SideFiles(
            from_="base" if inputs.base else inputs.experts[0].label,
            files=tuple(plan.files),
            config_dtype=plan.config_dtype,
        ),
        notes=tuple(plan.notes),
        environment=Environment(
            packages={name: version(name) for name in _PACKAGES},
            device=device,
            arithmetic="float64 in whole-matrix methods, float32 elsewhere (float64 for float64 weights)",
            torch_threads=1,
        ),
        delta_survival=_survival(execution.finished),
        output=Output(model_digest=model_digest(tensors, heads), files=_files(tree, plan, execution, sha256=sha256)),
        alignment=alignment,
        repair=repair,
    )


def read(path: Path) -> Manifest:
    """The manifest of a merged directory, or in a file; CheckpointError when it is no manifest of a known schema."""
    return Manifest.read(path / FILE if path.is_dir() else path)


def model_digest(tensors: Mapping[str, MergedTensor], heads: Mapping[str, Head]) -> str:
    """BLAKE3 over the names, dtypes, shapes and digests of all weights: the model, however it is sharded."""
    hasher = blake3()
    for name, entry in sorted(tensors.items()):
        hasher.update(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0{entry.digest}\n".encode())
    for task, head in sorted(heads.items()):
        for name, tensor in sorted(head.tensors.items()):
            hasher.update(f"heads/{task}/{name}\0{tensor}\n".encode())
    return hasher.hexdigest()


def verify(directory: Path) -> list[str]:
    """What in a merged directory is not as its manifest says, one sentence each; empty when all is.

    Weights are compared tensor by tensor, other files as a whole.
    """
    listed = read(directory)
    wrong: list[str] = []
    for name, entry in listed.output.files.items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry.size_bytes or not holds(file, entry):
            wrong.append(f"{name} has other bytes than the manifest says")
    known = {*listed.output.files, FILE, "README.md"}
    present = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    wrong += [f"{name} is not in the manifest" for name in sorted(present - known)]
    # An output may be an adapter, whose one file is opened by name.
    weights = directory / ADAPTER_WEIGHTS
    with Checkpoint.open(weights if weights.is_file() else directory) as checkpoint:
        for name in sorted(listed.tensors.keys() | checkpoint.tensors.keys()):
            if name not in checkpoint.tensors or name not in listed.tensors:
                wrong.append(f"tensor {name} is only {'in the manifest' if name in listed.tensors else 'on disk'}")
            elif tensor_digest(checkpoint, name) != listed.tensors[name].digest:
                wrong.append(f"tensor {name} has other bytes than the manifest says")
    return wrong


def _recipe(recipe: Recipe) -> ManifestRecipe:
    experts = recipe.models or {}
    return ManifestRecipe.model_validate(
        {
            **recipe.model_dump(mode="json", exclude={"base", "models"}),
            "models": {label: {"weight": entry.weight, "task": entry.task} for label, entry in experts.items()},
            "order": list(experts),
            "align": _without_places(recipe.align),
        }
    )


def _without_places(align: Align | None) -> dict[str, Any] | None:
    """The `align:` section without the places of its files, which differ from machine to machine."""
    if align is None:
        return None
    names = {"calibration": align.calibration, "validation": align.validation}
    named = {key: sorted(rows) if rows else None for key, rows in names.items()}
    document = {**align.model_dump(mode="json"), **named, "spec": align.spec is not None}
    # Release 0.1 called `beta` so: with another key, a merge made again would have another manifest.
    document["inside"] = document.pop("beta")
    return document


def _tensor(tensor: TensorPlan, entry: TensorRecord) -> MergedTensor:
    planned = {key: value for key, value in tensor.data().items() if key != "name"}
    found = {"digest": entry.digest, "delta_survival": entry.survival, "delta_norm": entry.delta_norm}
    # Smaller blocks change no byte, and how much memory was free is no part of what a merge is.
    device = {"device": "cpu"} if entry.fallback == "cpu" else {}
    return MergedTensor.model_validate({**planned, **found, **entry.diagnostics, **device})


def _parents(
    inputs: Inputs,
    execution: Execution,
    heads: Mapping[str, Head],
    sources: Mapping[str, Pinned],
) -> Parents:
    used: dict[str, dict[str, str]] = {}
    for entry in execution.finished.values():
        for label, tensor in entry.inputs.items():
            used.setdefault(label, {})[entry.tensor] = tensor
    experts = {
        expert.label: ExpertParent(
            weight=expert.weight,
            task=expert.task,
            prefix=expert.name_map.prefix,
            source=_source(sources.get(expert.label)),
            tensors=used.get(expert.label, {}),
            head=next((task for task, head in heads.items() if head.model == expert.label), None),
            adapter=dict(expert.adapter.config) if expert.adapter else None,
        )
        for expert in inputs.experts
    }
    base = None
    if inputs.base is not None:
        base = Parent(source=_source(sources.get("base")), tensors=used.get("base", {}))
    return Parents(base=base, experts=experts)


def _source(entry: Pinned | None) -> ParentSource | None:
    if entry is None:
        return None
    return ParentSource(
        uri=entry.uri,
        resolved=entry.resolved,
        revision=entry.revision,
        licence=entry.licence,
        files=entry.files,
    )


def _head(directory: Path, model: str) -> Head:
    with Checkpoint.open(directory / HEAD_WEIGHTS) as weights:
        return Head(model=model, tensors={name: tensor_digest(weights, name) for name in sorted(weights.tensors)})


def _survival(finished: Mapping[str, TensorRecord]) -> Survival | None:
    """Over all tensors that were merged into a base: the norm-weighted share of the delta that rounding left."""
    known = [entry for entry in finished.values() if entry.survival is not None and entry.delta_norm]
    if not known:
        return None
    total = sum((entry.delta_norm or 0.0) ** 2 for entry in known)
    lost = sum(((1 - (entry.survival or 0.0)) * (entry.delta_norm or 0.0)) ** 2 for entry in known)
    worst = min(known, key=lambda entry: (entry.survival or 0.0, entry.tensor))
    return Survival(whole_model=1 - (lost / total) ** 0.5, worst_tensor=worst.survival or 0.0)


def _files(tree: Path, plan: Plan, execution: Execution, *, sha256: bool) -> dict[str, OutputFile]:
    """Every file but this document and the model card. Of a shard of merged weights no byte is read again."""
    shards = {shard.file: shard for shard in plan.layout.shards}
    listed: dict[str, OutputFile] = {}
    for file in sorted(tree.rglob("*")):
        name = file.relative_to(tree).as_posix()
        if not file.is_file() or name in (FILE, "README.md"):
            continue
        tensors = None
        if name in shards:
            digests = (execution.finished[slot.name].digest for slot in shards[name].slots)
            tensors = shard_digest(shards[name].header, digests)
        listed[name] = OutputFile(
            size_bytes=file.stat().st_size,
            tensors_blake3=tensors,
            blake3=None if name in shards else file_blake3(file),
            sha256=file_sha256(file) if sha256 else None,
        )
    return listed
