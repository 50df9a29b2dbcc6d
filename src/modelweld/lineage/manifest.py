"""The merge manifest: one canonical document that says what a merged directory is and what it was made from.

It holds no clock, host, user, absolute path or commit, so that equal merges have equal manifests, byte for byte. Every
other lineage format is derived from it. `model_digest` identifies the weights alone: sharding does not change it.

    document = read(Path("merged"))
    print(digest(document), document["output"]["model_digest"])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from modelweld.checkpoints import Checkpoint, file_sha256, tensor_digest
from modelweld.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from modelweld.checkpoints.digests import file_blake3, holds, shard_digest
from modelweld.checkpoints.loading import HEAD_WEIGHTS, HEADS
from modelweld.checkpoints.shards import disk_errors
from modelweld.config import Recipe
from modelweld.engine.execute import Execution
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan, TensorPlan
from modelweld.errors import CheckpointError
from modelweld.methods.registry import provenance

SCHEMA = "modelweld.manifest/1"
FILE = "manifest.json"
_PACKAGES = ("modelweld", "torch", "numpy", "safetensors")


def build(
    recipe: Recipe,
    plan: Plan,
    inputs: Inputs,
    execution: Execution,
    tree: Path,
    *,
    device: str,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    sha256: bool = False,
    alignment: Mapping[str, Any] | None = None,
    repair: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of the merge in `tree`.

    `sources` are the pinned entries of the parents by label (`base` and the experts'), from sources.lock.json; with
    `sha256` the output files carry that digest too, at the price of reading them once more. `alignment` and `repair`
    say how units were matched and batch statistics recomputed; a merge without alignment has neither key.
    """
    heads = {head.task: _head(tree / HEADS / head.task, head.model) for head in plan.heads}
    tensors = {tensor.name: _tensor(tensor, execution.finished[tensor.name]) for tensor in plan.tensors}
    aligned = {} if alignment is None else {"alignment": dict(alignment), "repair": repair and dict(repair)}
    return {
        "schema": SCHEMA,
        "recipe": _recipe(recipe),
        "methods": {name: provenance(name) for name in sorted({t.method for t in plan.tensors if t.method})},
        "parents": _parents(inputs, execution, heads, sources or {}),
        "tensors": tensors,
        "heads": heads,
        "left_out": dict(plan.left_out),
        "side_files": {
            "from": "base" if inputs.base else inputs.experts[0].label,
            "files": list(plan.files),
            "config_dtype": plan.config_dtype,
        },
        "notes": list(plan.notes),
        "environment": {
            "packages": {name: version(name) for name in _PACKAGES},
            "device": device,
            "arithmetic": "float64 in whole-matrix methods, float32 elsewhere (float64 for float64 weights)",
            "torch_threads": 1,
        },
        "delta_survival": _survival(execution.finished),
        "output": {"model_digest": model_digest(tensors, heads), "files": _files(tree, plan, execution, sha256=sha256)},
        **aligned,
    }


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one way a manifest is written: sorted keys, one space of indent, UTF-8, a newline at the end."""
    return (json.dumps(document, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical bytes."""
    return hashlib.sha256(canonical(document)).hexdigest()


def write(document: Mapping[str, Any], directory: Path) -> Path:
    """Write the manifest into a merged directory."""
    file = directory / FILE
    with disk_errors(file):
        file.write_bytes(canonical(document))
    return file


def read(path: Path) -> dict[str, Any]:
    """The manifest of a merged directory, or in a file; CheckpointError when it is no manifest of a known schema."""
    file = path / FILE if path.is_dir() else path
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable manifest: {error}", where=str(file), hint="merge again") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"is not a {SCHEMA} (found {found!r})", where=str(file), hint="use a matching release")
    return document


def model_digest(tensors: Mapping[str, Mapping[str, Any]], heads: Mapping[str, Mapping[str, Any]]) -> str:
    """BLAKE3 over the names, dtypes, shapes and digests of all weights: the model, however it is sharded."""
    hasher = blake3()
    for name, entry in sorted(tensors.items()):
        hasher.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0{entry['digest']}\n".encode())
    for task, head in sorted(heads.items()):
        for name, tensor in sorted(head["tensors"].items()):
            hasher.update(f"heads/{task}/{name}\0{tensor}\n".encode())
    return hasher.hexdigest()


def verify(directory: Path) -> list[str]:
    """What in a merged directory is not as its manifest says, one sentence each; empty when all is.

    Weights are compared tensor by tensor, other files as a whole.
    """
    document = read(directory)
    wrong: list[str] = []
    for name, entry in document["output"]["files"].items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry["size_bytes"] or not holds(file, entry):
            wrong.append(f"{name} has other bytes than the manifest says")
    listed = {*document["output"]["files"], FILE, "README.md"}
    present = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    wrong += [f"{name} is not in the manifest" for name in sorted(present - listed)]
    # An output may be an adapter, whose one file is opened by name.
    weights = directory / ADAPTER_WEIGHTS
    with Checkpoint.open(weights if weights.is_file() else directory) as checkpoint:
        for name in sorted(document["tensors"].keys() | checkpoint.tensors.keys()):
            if name not in checkpoint.tensors or name not in document["tensors"]:
                wrong.append(f"tensor {name} is only {'in the manifest' if name in document['tensors'] else 'on disk'}")
            elif tensor_digest(checkpoint, name) != document["tensors"][name]["digest"]:
                wrong.append(f"tensor {name} has other bytes than the manifest says")
    return wrong


def _recipe(recipe: Recipe) -> dict[str, Any]:
    document = recipe.model_dump(mode="json", exclude={"base", "models"})
    experts = recipe.models or {}
    document["models"] = {label: {"weight": entry.weight, "task": entry.task} for label, entry in experts.items()}
    document["order"] = list(experts)
    if recipe.align is not None:
        # Paths differ from machine to machine: the digest of the matching stands for rows and spec.
        named = {key: sorted(getattr(recipe.align, key) or ()) or None for key in ("calibration", "validation")}
        document["align"] |= {**named, "spec": recipe.align.spec is not None}
        # Release 0.1 called `beta` so: with another key, a merge made again would have another manifest.
        document["align"]["inside"] = document["align"].pop("beta")
    return document


def _tensor(tensor: TensorPlan, entry: TensorRecord) -> dict[str, Any]:
    document = tensor.document()
    del document["name"]
    document |= {"digest": entry.digest, "delta_survival": entry.survival, "delta_norm": entry.delta_norm}
    # Smaller blocks change no byte, and how much memory was free is no part of what a merge is.
    return document | dict(entry.diagnostics) | ({"device": "cpu"} if entry.fallback == "cpu" else {})


def _parents(
    inputs: Inputs,
    execution: Execution,
    heads: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    used: dict[str, dict[str, str]] = {}
    for entry in execution.finished.values():
        for label, tensor in entry.inputs.items():
            used.setdefault(label, {})[entry.tensor] = tensor
    experts = {
        expert.label: {
            "weight": expert.weight,
            "task": expert.task,
            "prefix": expert.name_map.prefix,
            "source": _source(sources.get(expert.label)),
            "tensors": used.get(expert.label, {}),
            "head": next((task for task, head in heads.items() if head["model"] == expert.label), None),
        }
        | ({"adapter": dict(expert.adapter.config)} if expert.adapter else {})
        for expert in inputs.experts
    }
    base = None
    if inputs.base is not None:
        base = {"source": _source(sources.get("base")), "tensors": used.get("base", {})}
    return {"base": base, "experts": experts}


def _source(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {key: entry.get(key) for key in ("uri", "resolved", "revision", "licence", "files")}


def _head(directory: Path, model: str) -> dict[str, Any]:
    with Checkpoint.open(directory / HEAD_WEIGHTS) as weights:
        tensors = {name: tensor_digest(weights, name) for name in sorted(weights.tensors)}
    return {"model": model, "tensors": tensors}


def _survival(finished: Mapping[str, TensorRecord]) -> dict[str, float] | None:
    """Over all tensors that were merged into a base: the norm-weighted share of the delta that rounding left."""
    known = [entry for entry in finished.values() if entry.survival is not None and entry.delta_norm]
    if not known:
        return None
    total = sum((entry.delta_norm or 0.0) ** 2 for entry in known)
    lost = sum(((1 - (entry.survival or 0.0)) * (entry.delta_norm or 0.0)) ** 2 for entry in known)
    worst = min(known, key=lambda entry: (entry.survival or 0.0, entry.tensor))
    return {"whole_model": 1 - (lost / total) ** 0.5, "worst_tensor": worst.survival or 0.0}


def _files(tree: Path, plan: Plan, execution: Execution, *, sha256: bool) -> dict[str, dict[str, Any]]:
    """Every file but this document and the model card. Of a shard of merged weights no byte is read again."""
    shards = {shard.file: shard for shard in plan.layout.shards}
    listed: dict[str, dict[str, Any]] = {}
    for file in sorted(tree.rglob("*")):
        name = file.relative_to(tree).as_posix()
        if not file.is_file() or name in (FILE, "README.md"):
            continue
        listed[name] = {"size_bytes": file.stat().st_size}
        if name in shards:
            digests = (execution.finished[slot.name].digest for slot in shards[name].slots)
            listed[name]["tensors_blake3"] = shard_digest(shards[name].header, digests)
        else:
            listed[name]["blake3"] = file_blake3(file)
        if sha256:
            listed[name]["sha256"] = file_sha256(file)
    return listed
