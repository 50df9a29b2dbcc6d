"""Which tensor of one model corresponds to which of another: backbone prefixes, heads, tied weights.

transformers keeps a backbone under one attribute (`base_model_prefix`): a BERT classifier stores `bert.encoder…` where
the bare model stores `encoder…`. The prefix is read off the names themselves, so that no model code has to be imported
and families that transformers does not know are matched too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.errors import CheckpointError

BLOCK = 1 << 20

# Architectures whose head belongs to one task; language-model heads belong to the model.
_TASK_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression|NextSentencePrediction)$")
# Non-trainable state that checkpoints carry: running statistics, masks, position ranges, rotary frequencies.
_BUFFER = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|token_type_ids|inv_freq|masked_bias"
    r"|relative_position_index|rotary_emb\.\w+|h\.\d+\.attn\.bias)$"
)
_POOLER = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True)
class NameMap:
    """One model's tensor names by the reference's: `names` maps reference to stored, `head` is the task's own.

    Stored backbone names are `prefix` + the reference's name without `reference_prefix`. `absent` are reference names
    that this model lacks with good reason (its architecture has no pooler, the weight is tied), `ignored` are its own
    that the merge does not need; both say why.
    """

    names: dict[str, str]
    head: tuple[str, ...]
    prefix: str
    reference_prefix: str
    absent: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def has_task_head(checkpoint: Checkpoint) -> bool:
    """Whether config.json names an architecture whose head belongs to one task."""
    return any(_TASK_HEAD.search(str(name)) for name in checkpoint.config.get("architectures") or ())


def is_buffer(name: str) -> bool:
    """Whether a tensor of that name is state rather than a trained parameter."""
    return _BUFFER.search(name) is not None


def match_names(reference: Checkpoint, model: Checkpoint, label: str) -> NameMap:
    """The names of `model` (called `label` in errors) by those of `reference`.

    Raises CheckpointError naming the tensors for other architectures, and both shapes (or vocabulary sizes) where they
    differ.
    """
    prefix, reference_prefix = _prefixes(reference, model)
    own_head = has_task_head(model)
    backbone = {name for name in model.tensors if name.startswith(prefix)} if own_head else set(model.tensors)
    head = [name for name in model.tensors if name not in backbone]
    names: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in reference.tensors:
        stored = _translated(name, reference_prefix, prefix)
        if stored is not None and stored in backbone:
            names[name] = stored
        elif stored is None and (own_head or has_task_head(reference)):
            absent[name] = "the reference's own head"
        else:
            absent[name] = _why_absent(reference, model, name, label)
    ignored: dict[str, str] = {}
    for stored in sorted(backbone - set(names.values())):
        if own_head and _POOLER.search(stored):
            head.append(stored)
        else:
            ignored[stored] = _why_ignored(model, stored, label, set(names.values()))
    for name, stored in names.items():
        _same_shape(reference, model, name, stored, label)
    return NameMap(names, tuple(sorted(head)), prefix, reference_prefix, absent, ignored)


def tied_partner(checkpoint: Checkpoint, name: str, among: set[str] | None = None) -> str | None:
    """Another tensor of the same shape and dtype with the very same bytes: the weight that `name` is tied to."""
    info = checkpoint.tensors[name]
    for other in checkpoint.tensors.values():
        if other.name == name or (among is not None and other.name not in among):
            continue
        if info.shape == other.shape and info.dtype == other.dtype and _same_bytes(checkpoint, name, other.name):
            return other.name
    return None


def tied_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored copies of the input embedding, by name, where the config says that output and input are tied."""
    if not checkpoint.config.get("tie_word_embeddings"):
        return {}
    vocabulary = checkpoint.config.get("vocab_size")
    tables = [t.name for t in checkpoint.tensors.values() if len(t.shape) == 2 and t.shape[0] == vocabulary]
    inputs = [name for name in tables if re.search(r"embed|shared|wte", name)]
    tied: dict[str, str] = {}
    for name in tables:
        earlier = set(inputs[: inputs.index(name)] if name in inputs else inputs) - set(tied)
        partner = tied_partner(checkpoint, name, earlier)
        if partner is not None:
            tied[name] = partner
    return tied


def _prefixes(reference: Checkpoint, model: Checkpoint) -> tuple[str, str]:
    """The pair of prefixes (model's, reference's) under which the most names agree; none at all when that suffices."""
    # A task architecture keeps its head outside its backbone, which holds nearly all the tensors.
    mine = [_dominant(model)] if has_task_head(model) else ["", *_components(model)]
    theirs = [_dominant(reference)] if has_task_head(reference) else ["", *_components(reference)]
    best, agreeing = (mine[0], theirs[0]), -1
    for prefix in mine:
        own = {name.removeprefix(prefix) for name in model.tensors if name.startswith(prefix)}
        for other in theirs:
            shared = sum(n.removeprefix(other) in own for n in reference.tensors if n.startswith(other))
            if shared > agreeing:
                best, agreeing = (prefix, other), shared
    return best


def _components(checkpoint: Checkpoint) -> list[str]:
    counts = Counter(name.split(".", 1)[0] + "." for name in checkpoint.tensors if "." in name)
    return [component for component, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _dominant(checkpoint: Checkpoint) -> str:
    components = _components(checkpoint)
    return components[0] if components else ""


def _translated(name: str, reference_prefix: str, prefix: str) -> str | None:
    return prefix + name.removeprefix(reference_prefix) if name.startswith(reference_prefix) else None


def _why_absent(reference: Checkpoint, model: Checkpoint, name: str, label: str) -> str:
    if is_buffer(name) or not reference.tensors[name].dtype.is_floating_point:
        return "a buffer"
    if _POOLER.search(name):
        return "this architecture has no pooler"
    partner = tied_partner(reference, name)
    if partner is not None:
        return f"tied to {partner}"
    raise CheckpointError(
        f"{label} lacks tensor {name!r}, which is present in the base",
        where=str(model.path),
        hint="only models finetuned from this very base can be merged into it",
    )


def _why_ignored(model: Checkpoint, stored: str, label: str, used: set[str]) -> str:
    if is_buffer(stored) or not model.tensors[stored].dtype.is_floating_point:
        return "a buffer that is not present in the base"
    partner = tied_partner(model, stored, used)
    if partner is not None:
        return f"tied to {partner}"
    raise CheckpointError(
        f"{label} has tensor {stored!r}, which is not present in the base",
        where=str(model.path),
        hint="only models finetuned from this very base can be merged into it",
    )


def _same_shape(reference: Checkpoint, model: Checkpoint, name: str, stored: str, label: str) -> None:
    here, there = model.tensors[stored].shape, reference.tensors[name].shape
    if here == there:
        return
    sizes = (model.config.get("vocab_size"), reference.config.get("vocab_size"))
    table = len(here) == len(there) == 2 and here[1:] == there[1:]
    if table and (sizes == (here[0], there[0]) or re.search(r"embed|shared|wte|lm_head", name)):
        raise CheckpointError(
            f"{label} has a vocabulary of {here[0]}, the base one of {there[0]} ({name})",
            where=model.place(stored),
            hint="resize the vocabulary back to the base's, or use a base with the same tokenizer",
        )
    raise CheckpointError(
        f"{label} has shape {list(here)}, the base {list(there)} ({name})",
        where=model.place(stored),
        hint="only models of one architecture can be merged",
    )


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    size = checkpoint.tensors[one].nbytes
    left, right = bytearray(min(BLOCK, size)), bytearray(min(BLOCK, size))
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        checkpoint.read_into(one, start, memoryview(left)[:count])
        checkpoint.read_into(other, start, memoryview(right)[:count])
        if left[:count] != right[:count]:
            return False
    return True


@dataclass(frozen=True)
class NameDiff:
    """`match_names` for a report: tensors with a counterpart (of any shape), the head, and those without one."""

    names: dict[str, str]
    head: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def diff_names(reference: Checkpoint, model: Checkpoint) -> NameDiff:
    """Everything that fits and everything that does not, where `match_names` raises at the first that does not."""
    prefix, reference_prefix = _prefixes(reference, model)
    own_head = has_task_head(model)
    backbone = {name for name in model.tensors if name.startswith(prefix)} if own_head else set(model.tensors)
    head = [name for name in model.tensors if name not in backbone]
    names: dict[str, str] = {}
    missing: list[str] = []
    for name in reference.tensors:
        stored = _translated(name, reference_prefix, prefix)
        if stored is not None and stored in backbone:
            names[name] = stored
        elif not (stored is None and (own_head or has_task_head(reference))) and _refused(
            partial(_why_absent, reference, model, name, "")
        ):
            missing.append(name)
    used, extra = set(names.values()), []
    for stored in sorted(backbone - used):
        if own_head and _POOLER.search(stored):
            head.append(stored)
        elif _refused(partial(_why_ignored, model, stored, "", used)):
            extra.append(stored)
    return NameDiff(names, tuple(sorted(head)), tuple(sorted(missing)), tuple(extra))


def _refused(explain: Callable[[], str]) -> bool:
    try:
        explain()
    except CheckpointError:
        return True
    return False
