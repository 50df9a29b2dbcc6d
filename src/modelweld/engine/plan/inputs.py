"""The models of a recipe, opened and laid beside each other; what cannot be merged is refused here, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.adapter import Adapter, is_adapter
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.header import LENGTH_BYTES
from modelweld.checkpoints.names import NameMap, has_task_head, match_names, tied_weights
from modelweld.config import Recipe
from modelweld.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Expert:
    """One model to merge, and how its names lie beside the reference's.

    An adapter's `checkpoint` also holds the base's tensors, which stand for what the adapter has left alone.
    """

    label: str
    checkpoint: Checkpoint
    weight: float
    task: str | None
    name_map: NameMap
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Inputs:
    """Base and experts. `reference` gives names, dtypes and side files: the base, or without one the first expert."""

    base: Checkpoint | None
    experts: tuple[Expert, ...]
    reference: Checkpoint
    tied: Mapping[str, str]

    @property
    def weights(self) -> list[float]:
        """The experts' weights, in their order."""
        return [expert.weight for expert in self.experts]


# What may differ between the configs of experts that have no base to take one from.
_OWN_KEYS = frozenset(
    ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "_name_or_path", "transformers_version")
) | frozenset(("architectures", "dtype", "torch_dtype", "use_cache"))


@contextlib.contextmanager
def open_inputs(recipe: Recipe) -> Iterator[Inputs]:
    """The recipe's models, open while the context lasts.

    Raises ConfigError for a recipe without models or two heads of one task, CheckpointError naming model and tensor
    for whatever does not fit together.
    """
    if not recipe.models:
        raise ConfigError("names no models", where="models", hint="models: {sst2: {path: …}}")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(Checkpoint.open(recipe.base)) if recipe.base else None
        adapters: dict[str, Adapter] = {}
        for label, entry in recipe.models.items():
            if not is_adapter(str(entry.path)):
                continue
            adapters[label] = _adapter(str(entry.path), base, label)
            stack.enter_context(adapters[label].checkpoint)
        opened: dict[str, Checkpoint] = {
            label: adapters[label].checkpoint
            if label in adapters
            else stack.enter_context(Checkpoint.open(str(entry.path)))
            for label, entry in recipe.models.items()
        }
        if base is not None and recipe.alignment is not None and len(adapters) < len(opened):
            # Beside whole models an adapter is one too: its base's units are brought to the common order with it.
            opened |= {label: Folded(own, base, rounded=False) for label, own in adapters.items()}
            adapters = {}
        reference = base or next(iter(opened.values()))
        if base is None:
            _same_configs(opened)
        experts = tuple(
            Expert(label, opened[label], entry.weight, entry.task, adapters[label].name_map, adapters[label])
            if label in adapters
            else Expert(label, opened[label], entry.weight, entry.task, match_names(reference, opened[label], label))
            for label, entry in recipe.models.items()
        )
        _one_head_a_task(experts)
        tied = tied_weights(reference)
        for expert in experts:
            if expert.adapter is None:
                _still_tied(expert, tied)
            else:
                _not_tied(expert, tied)
        yield Inputs(base, experts, reference, tied)


def identity(checkpoint: Checkpoint) -> str:
    """What tells one state of a checkpoint on disk from another without reading its weights: for resuming only."""
    hasher = blake3()
    for file in checkpoint.files:
        state = file.stat()
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little") if file.suffix == ".safetensors" else 0
            header = stream.read(min(length, 1 << 27))
        hasher.update(f"{file.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        hasher.update(header)
    return hasher.hexdigest()


def _adapter(path: str, base: Checkpoint | None, label: str) -> Adapter:
    if base is None:
        raise ConfigError(
            f"{label} is an adapter, and there is no base to put it on", where="base", hint="name it: `base: …`"
        )
    return Adapter.open(path, base, label)


def task_of(expert: Expert) -> str:
    """The name of the expert's head: its task's, or its own."""
    return expert.task or expert.label


def _one_head_a_task(experts: tuple[Expert, ...]) -> None:
    owners: dict[str, str] = {}
    for expert in experts:
        if not expert.name_map.head:
            continue
        other = owners.setdefault(task_of(expert), expert.label)
        if other != expert.label:
            raise ConfigError(
                f"{other} and {expert.label} both bring a head for task {task_of(expert)!r}",
                where="models",
                hint="give each its own `task:`",
            )


def _still_tied(expert: Expert, tied: Mapping[str, str]) -> None:
    """An expert that stores both ends of a tied weight must store them equal."""
    names, own = expert.name_map.names, expert.checkpoint
    for name, partner in tied.items():
        ends = names.get(name), names.get(partner)
        if ends[0] is None or ends[1] is None:
            continue
        if _bytes_differ(own, ends[0], ends[1]):
            raise CheckpointError(
                f"{expert.label} has untied {name} from {partner}, which the base ties",
                where=str(own.path),
                hint="leave this model out, or untie the base's weights and set tie_word_embeddings: false",
            )


def _not_tied(expert: Expert, tied: Mapping[str, str]) -> None:
    touched = expert.adapter.touched if expert.adapter else frozenset()
    for name, partner in tied.items():
        changed = next((end for end in (name, partner) if end in touched), None)
        if changed is not None:
            raise CheckpointError(
                f"{expert.label} adapts {changed}, and the base ties {name} to {partner}",
                where=str(expert.checkpoint.path),
                hint="untie the base's weights and set tie_word_embeddings: false, or leave this adapter out",
            )


def _bytes_differ(checkpoint: Checkpoint, one: str, other: str) -> bool:
    from modelweld.checkpoints.names import tied_partner

    return tied_partner(checkpoint, one, {other}) is None


def _first_difference(one: Checkpoint, other: Checkpoint) -> str | None:
    """The first layer in which two models of the same layout differ in shape, or that one of them has alone."""

    def order(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
        parts = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
        # What is in no layer (embeddings, heads) comes last.
        return not any(number for number, _, _ in parts), parts

    if not one.tensors.keys() & other.tensors.keys():
        return None
    for name in sorted(one.tensors.keys() | other.tensors.keys(), key=order):
        here, there = one.tensors.get(name), other.tensors.get(name)
        if here is None or there is None:
            return f"only one of them has {name}"
        if here.shape != there.shape:
            return f"{name} is {here.shape} and {there.shape}"
    return None


def _same_configs(opened: Mapping[str, Checkpoint]) -> None:
    labels = list(opened)
    first = {k: v for k, v in opened[labels[0]].config.items() if k not in _OWN_KEYS}
    heads = {label: has_task_head(checkpoint) for label, checkpoint in opened.items()}
    for label in labels[1:]:
        other = {k: v for k, v in opened[label].config.items() if k not in _OWN_KEYS}
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing and (layer := _first_difference(opened[labels[0]], opened[label])):
            raise ConfigError(
                f"{labels[0]} and {label} are not of one depth and width ({', '.join(differing[:5])}): {layer}",
                where=str(Path(opened[label].path)),
                hint="merge models of one architecture, depth and width",
            )
        if differing or heads[label] != heads[labels[0]]:
            raise ConfigError(
                f"{labels[0]} and {label} have different configs ({', '.join(differing[:5]) or 'architectures'}), and "
                "there is no base to take one from",
                where=str(Path(opened[label].path)),
                hint="name the model they were finetuned from: `base: …`",
            )
