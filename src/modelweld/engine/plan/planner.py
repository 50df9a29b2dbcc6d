"""What a merge will do, decided before a weight is read: one entry a tensor, and everything left out, with reasons."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from modelweld.checkpoints import TensorInfo, tensor_digest
from modelweld.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from modelweld.checkpoints.checkpoint import read_json, require_inside
from modelweld.checkpoints.orientation import stored_transposed
from modelweld.checkpoints.rounding import folded_rank
from modelweld.checkpoints.shards import Layout, lay_out
from modelweld.config import Recipe
from modelweld.engine.plan.adapters import bytes_read, kept_as_adapter, ranks_of, route_of
from modelweld.engine.plan.inputs import Expert, Inputs, identity, task_of
from modelweld.engine.plan.records import HeadPlan, Plan, TensorPlan, dtype_name
from modelweld.engine.plan.roles import MERGEABLE, packing_of, role_of
from modelweld.engine.plan.rules import decide
from modelweld.errors import CheckpointError, ConfigError, MergeError
from modelweld.methods.method import TensorContext
from modelweld.methods.registry import method, provenance

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)
_HALVES = (torch.bfloat16, torch.float16)


def build(recipe: Recipe, inputs: Inputs) -> Plan:
    """The plan of a recipe over opened inputs.

    Raises ConfigError for a method without the base it needs or a rule that cannot hold, MergeError for weights or a
    number of models that a method refuses, CheckpointError for quantised models and tensors only some experts have.
    """
    _not_quantised(inputs)
    if inputs.base is None:
        _one_tokenizer(inputs)
    left_out: dict[str, str] = dict(_unused(inputs))
    transposed = stored_transposed(inputs.reference)
    tensors: list[TensorPlan] = []
    order = sorted(inputs.reference.tensors.values(), key=lambda info: (info.file.name, info.offset, info.name))
    for info in order:
        if info.name in inputs.tied:
            left_out[info.name] = f"tied to {inputs.tied[info.name]}, and still so when loaded"
            continue
        absent = _absence(info, inputs.experts)
        if absent is not None and absent.startswith(("the reference's own head", "tied to")):
            left_out[info.name] = absent
            continue
        planned = _tensor(recipe, info, inputs, absent, info.name in transposed)
        if planned is None:
            left_out[info.name] = "skipped by a rule"
        else:
            tensors.append(planned)
    if not tensors:
        raise ConfigError("nothing is left to merge", where="rules", hint="fewer `use: skip`")
    _try_methods(tensors, inputs)
    ranks = None
    if recipe.output.adapter == "keep":
        left_out |= {tensor.name: "the base's own" for tensor in tensors if tensor.action == "copy"}
        tensors, ranks = kept_as_adapter(recipe, tensors, inputs)
        layout = lay_out([(t.name, t.dtype, t.shape) for t in tensors], 1 << 62, single=ADAPTER_WEIGHTS)
    else:
        layout = lay_out([(t.name, t.dtype, t.shape) for t in tensors], recipe.output.shard_bytes)
    heads = tuple(_head(expert) for expert in inputs.experts if expert.name_map.head)
    files = _side_files(inputs.reference.path) if ranks is None else ()
    key = _key(recipe, inputs, tensors, layout)
    notes = _notes(inputs, tensors)
    return Plan(tuple(tensors), heads, files, left_out, notes, layout, key, _config_dtype(recipe, inputs), ranks)


def _tensor(
    recipe: Recipe, info: TensorInfo, inputs: Inputs, absent: str | None, transposed: bool
) -> TensorPlan | None:
    role = role_of(info)
    decision = decide(recipe, info, role)
    if decision.action == "skip":
        return None
    copied = decision.action == "copy" or absent is not None
    parameters = None if copied else decision.parameters
    reason = absent if absent is not None and decision.action != "copy" else decision.reason
    route = route_of(info.name, parameters, inputs) if parameters else "dense"
    if route is None:
        copied, parameters, reason = True, None, "no adapter changes it"
    chosen = method(parameters.method) if parameters else None
    if chosen is not None and chosen.needs_base and inputs.base is None:
        raise ConfigError(
            f"{chosen.name} needs the model that the experts were finetuned from ({info.name})",
            where="base",
            hint="name it: `base: path/to/model`",
        )
    if copied and inputs.base is None:
        _same_everywhere(info, inputs, decision.reason)
    stored = () if copied else tuple(expert.name_map.names[info.name] for expert in inputs.experts)
    sources = [expert.checkpoint.tensors[name] for expert, name in zip(inputs.experts, stored, strict=bool(stored))]
    for expert, source in zip(inputs.experts, sources, strict=bool(sources)):
        if source.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{expert.label} stores {info.name} as {dtype_name(source.dtype)}, which cannot be merged",
                where=expert.checkpoint.place(source.name),
                hint="use an unquantised version of this model",
            )
    if chosen is None or chosen.needs_base or (inputs.base is not None and chosen.whole_matrix):
        sources.append(info)
    matrix = chosen is not None and chosen.whole_matrix
    rows = info.shape[1 if transposed else 0] if matrix else 0
    wide = any(source.dtype == torch.float64 for source in sources) or (
        route == "factors" or (matrix and route == "densified")
    )
    read_bytes = sum(source.nbytes for source in sources)
    if route in ("factors", "densified"):
        read_bytes = info.nbytes + sum(bytes_read(info.name, expert) for expert in inputs.experts)
    return TensorPlan(
        name=info.name,
        action="copy" if copied else "merge",
        role=role,
        parameters=parameters,
        reason=reason,
        shape=info.shape,
        source_dtype=info.dtype,
        dtype=_output_dtype(info, recipe.output.dtype, merged=not copied),
        stored=stored,
        read_bytes=read_bytes,
        work_dtype=torch.float64 if wide else torch.float32,
        transposed=matrix and transposed,
        packing=packing_of(info.name, rows, inputs.reference.config) if matrix else None,
        route=route or "dense",
        ranks=ranks_of(info.name, inputs) if route in ("factors", "densified") else (),
    )


def _same_everywhere(info: TensorInfo, inputs: Inputs, reason: str) -> None:
    """Without a base, what is not merged must be the same in every expert: none of them is the one to copy from."""
    if reason.startswith("rule"):
        raise ConfigError(
            f"{reason} takes {info.name} from the base, and the recipe names none", where="base", hint="name it"
        )
    digests = {
        expert.label: tensor_digest(expert.checkpoint, expert.name_map.names[info.name])
        for expert in inputs.experts
        if info.name in expert.name_map.names
    }
    if len(set(digests.values())) > 1:
        raise ConfigError(
            f"{info.name} ({reason}) differs between {', '.join(digests)}, and there is no base to take it from",
            where="base",
            hint="name the model that they were finetuned from: `base: …`",
        )


def _one_tokenizer(inputs: Inputs) -> None:
    first, *others = inputs.experts
    ours = _vocabulary(first.checkpoint.path)
    for expert in others:
        if _vocabulary(expert.checkpoint.path) != ours:
            raise ConfigError(
                f"{first.label} and {expert.label} have different tokenizers, and there is no base to take one from",
                where="base",
                hint="name the model that they were finetuned from: `base: …`",
            )


def _output_dtype(info: TensorInfo, asked: str, *, merged: bool) -> torch.dtype:
    if info.dtype not in MERGEABLE:
        return info.dtype
    if asked != "auto":
        chosen: torch.dtype = getattr(torch, asked)
        return chosen
    # A norm's or bias' delta is smaller than half precision can show beside its value; keeping it costs nothing.
    small = merged and len(info.shape) <= 1 and info.dtype in _HALVES
    return torch.float32 if small else info.dtype


def _absence(info: TensorInfo, experts: tuple[Expert, ...]) -> str | None:
    """Why no expert has this tensor; None when all do."""
    reasons = {expert.label: expert.name_map.absent.get(info.name) for expert in experts}
    lacking = [label for label, reason in reasons.items() if reason is not None]
    if not lacking:
        return None
    reason = reasons[lacking[0]]
    if (
        len(lacking) < len(experts)
        and role_of(info) not in ("buffer", "integer")
        and not str(reason).startswith("tied")
    ):
        raise CheckpointError(
            f"{', '.join(lacking)} lack tensor {info.name!r} ({reason}), the other experts have it",
            where=info.name,
            hint="merge experts of one architecture, or leave it out: a rule with `use: base` or `use: skip`",
        )
    return str(reason)


def _unused(inputs: Inputs) -> list[tuple[str, str]]:
    return [
        (f"{expert.label}:{name}", reason)
        for expert in inputs.experts
        for name, reason in sorted(expert.name_map.ignored.items())
    ]


def _not_quantised(inputs: Inputs) -> None:
    models = {"base": inputs.base} if inputs.base else {}
    models |= {expert.label: expert.checkpoint for expert in inputs.experts}
    for label, checkpoint in models.items():
        floats = [i for i in checkpoint.tensors.values() if i.dtype.is_floating_point and i.dtype not in MERGEABLE]
        if checkpoint.config.get("quantization_config") or floats:
            seen = f" ({floats[0].name} is {dtype_name(floats[0].dtype)})" if floats else ""
            raise CheckpointError(
                f"{label} is quantised{seen}",
                where=str(checkpoint.path),
                hint="use an unquantised version of this model",
            )


def _try_methods(tensors: list[TensorPlan], inputs: Inputs) -> None:
    """Let every method refuse the number of models and their weights now, on a stack of ones, not hours later."""
    for parameters in dict.fromkeys(tensor.parameters for tensor in tensors if tensor.parameters):
        shape = (2, 2) if method(parameters.method).whole_matrix else (4,)
        digests = tuple(expert.label for expert in inputs.experts)
        context = TensorContext(f"method {parameters.method}", digests, digests)
        try:
            method(parameters.method).merge(
                torch.ones(len(inputs.experts), *shape), parameters, inputs.weights, context=context
            )
        except MergeError as error:
            raise MergeError(error.what, where="models", hint=error.hint) from error


def _head(expert: Expert) -> HeadPlan:
    name_map = expert.name_map
    size = sum(expert.checkpoint.tensors[name].nbytes for name in name_map.head)
    task = task_of(expert)
    return HeadPlan(task, expert.label, name_map.head, name_map.prefix, name_map.reference_prefix, size)


def _config_dtype(recipe: Recipe, inputs: Inputs) -> str | None:
    if recipe.output.dtype != "auto":
        return recipe.output.dtype
    config = inputs.reference.config
    named = config.get("dtype", config.get("torch_dtype"))
    return named if isinstance(named, str) else None


def _side_files(path: Path) -> tuple[str, ...]:
    directory = path if path.is_dir() else path.parent
    files = sorted(file.name for file in directory.iterdir() if file.is_file())
    chosen = tuple(name for name in files if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES))
    for name in chosen:
        require_inside(directory / name, directory)
    return chosen


def _notes(inputs: Inputs, tensors: list[TensorPlan]) -> tuple[str, ...]:
    notes = []
    matrices = {t.name for t in tensors if t.parameters and method(t.parameters.method).whole_matrix}
    for expert in inputs.experts:
        if (
            inputs.base is None
            or expert.adapter is not None
            or inputs.base.headers_only
            or expert.checkpoint.headers_only
        ):
            continue
        names = {name: stored for name, stored in expert.name_map.names.items() if name in matrices}
        rank = folded_rank(inputs.base, expert.checkpoint, names)
        if rank is not None:
            notes.append(
                f"{expert.label} looks like an adapter of rank {rank} or so that was folded into half precision, whose "
                "rounding noise is merged with it: merge from the adapter"
            )
    ours = _vocabulary(inputs.reference.path)
    for expert in inputs.experts:
        theirs = _vocabulary(expert.checkpoint.path)
        if ours is not None and theirs is not None and ours != theirs:
            notes.append(f"{expert.label} has another tokenizer; the base's is kept")
    return tuple(notes)


def _vocabulary(path: Path) -> dict[str, Any] | None:
    """What a tokenizer does to text, without the padding and truncation it was last used with."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    return {key: value for key, value in read_json(file).items() if key not in ("padding", "truncation")}


def _key(recipe: Recipe, inputs: Inputs, tensors: list[TensorPlan], layout: Layout) -> str:
    """Names one merge of inputs in one state: an interrupted run is resumed only under the same key."""
    document = {
        "recipe": recipe.model_dump(mode="json", exclude={"base", "models"}),
        "base": identity(inputs.base) if inputs.base else None,
        "experts": [(e.label, e.weight, e.task, identity(e.checkpoint)) for e in inputs.experts],
        "adapters": {e.label: dict(e.adapter.config) for e in inputs.experts if e.adapter},
        "tensors": [tensor.data() for tensor in tensors],
        "versions": {t.method: provenance(t.method) for t in tensors if t.method},
        "layout": [blake3(shard.header).hexdigest() for shard in layout.shards],
    }
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()
