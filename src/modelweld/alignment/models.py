"""The models of an alignment: each one's symmetry by the names that all share, checked on its real weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelweld.alignment.specs import derive_cached, load_spec
from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.names import is_buffer
from modelweld.config.align import Align
from modelweld.engine import Inputs
from modelweld.engine.plan.inputs import Expert
from modelweld.errors import ConfigError, MergeError
from modelweld.symmetry import Factor, Spec, check_invariance
from modelweld.symmetry.families import STATISTICS
from modelweld.symmetry.instances import example_inputs, instantiate, own_names
from modelweld.symmetry.spec import join, leaves
from modelweld.symmetry.spec import moves as moves

BASE = "base"


@dataclass(frozen=True)
class AlignedModel:
    """One model of the alignment: its tensor names by the common ones, and its own spec with the common groups.

    A checkpoint's names need not be those of the module that it is loaded into: `module_names` gives the latter by the
    former, and `module_spec` is the spec by the names of the module.
    """

    label: str
    checkpoint: Checkpoint
    names: Mapping[str, str]
    spec: Spec
    module_names: Mapping[str, str]
    module_spec: Spec


def models_of(settings: Align, inputs: Inputs, root: Path) -> tuple[Spec, list[AlignedModel]]:
    """The spec that all experts share, by common names, and each expert's own with the groups of that one."""
    module_specs = [
        load_spec(Path(settings.spec)) if settings.spec else _derive(expert, root) for expert in inputs.experts
    ]
    module_names = [own_names(instantiate(_config(e.checkpoint)), e.checkpoint.tensors) for e in inputs.experts]
    specs = [spec.renamed(own) for spec, own in zip(module_specs, module_names, strict=True)]
    first, names = inputs.experts[0], [expert.name_map.names for expert in inputs.experts]
    tied = set(inputs.tied)
    shared = [name for name in names[0] if name not in tied and all(name in other for other in names[1:])]
    shared = [name for name in shared if _movable(first, names[0][name], specs[0])]
    axes = {name: specs[0].axes[names[0][name]] for name in shared}
    used = {factor.group for own in axes.values() for axis in own for factor in leaves(axis) if factor.group}
    groups = {name: group for name, group in specs[0].groups.items() if name in used}
    reads = frozenset(
        (name, dim) for name in shared for dim in range(len(axes[name])) if (names[0][name], dim) in specs[0].reads
    )
    common = Spec(groups, axes, reads)
    if not common.groups:
        raise MergeError(
            "nothing in this architecture can be permuted",
            where=first.label,
            hint="merge without `align:`; `modelweld symmetry` says what froze each axis",
        )
    models = []
    for expert, module_spec, spec, own_modules in zip(inputs.experts, module_specs, specs, module_names, strict=True):
        own = expert.name_map.names
        known = _renaming(axes, spec, own, first.label, expert.label)
        names_here = {name: own[name] for name in common.axes}
        sizes = {module: expert.checkpoint.tensors[name].shape for name, module in own_modules.items()}
        here = _renamed(module_spec, known, common, sizes)
        models.append(
            AlignedModel(expert.label, expert.checkpoint, names_here, here.renamed(own_modules), own_modules, here)
        )
    return common, models


def base_model(inputs: Inputs, common: Spec, first: AlignedModel) -> AlignedModel:
    """The base as the model whose order is the common one; ConfigError without one."""
    if inputs.base is None:
        raise ConfigError("the recipe names no base", where="base", hint="name it")
    # It is run as the first expert's class, under that expert's names.
    return replace(first, label=BASE, checkpoint=inputs.base, names={name: name for name in common.axes})


def load(model: AlignedModel, inputs: Inputs) -> nn.Module:
    """The transformers model in float32, of the class that its spec was derived from."""
    if model.label != BASE:
        return model_of(model.checkpoint)
    head_from = inputs.experts[0]
    state = {own: model.checkpoint.read(name) for name, own in head_from.name_map.names.items()}
    state |= {name: head_from.checkpoint.read(name) for name in head_from.name_map.head}
    return _loaded(head_from.checkpoint, pretrained_model_name_or_path=None, state_dict=state)


def model_of(checkpoint: Checkpoint) -> nn.Module:
    """The transformers model of a checkpoint in float32, of the class that its config names."""
    if isinstance(checkpoint, Folded):
        state = {name: checkpoint.read(name) for name in checkpoint.tensors}
        return _loaded(checkpoint, pretrained_model_name_or_path=None, state_dict=state)
    return _loaded(checkpoint, pretrained_model_name_or_path=checkpoint.path)


def architecture(model: AlignedModel, inputs: Inputs) -> nn.Module:
    """The model's class without its weights, on the meta device: every shape, no memory."""
    return instantiate(_config(inputs.experts[0].checkpoint if model.label == BASE else model.checkpoint))


def _loaded(checkpoint: Checkpoint, **source: Any) -> nn.Module:
    config = _config(checkpoint)
    model: nn.Module = type(instantiate(config)).from_pretrained(  # type: ignore[attr-defined]
        **source, config=config, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def check_model(module: nn.Module, model: AlignedModel) -> float:
    """The relative output error of a model under random permutations of its groups; MergeError, with its label."""
    try:
        return check_invariance(module, model.module_spec, example_inputs(module))
    except MergeError as error:
        raise MergeError(error.what, where=f"{model.label}, {error.where}", hint=error.hint) from error


def _derive(expert: Expert, root: Path) -> Spec:
    try:
        return derive_cached(_config(expert.checkpoint), root)
    except MergeError as error:
        raise MergeError(error.what, where=f"{expert.label}, {error.where}", hint=error.hint) from error


def _config(checkpoint: Checkpoint) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if isinstance(checkpoint, Folded):
            return AutoConfig.for_model(**checkpoint.config)
        return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        message = str(error).strip().splitlines()[0]
        raise ConfigError(f"no config that transformers knows: {message}", where=str(checkpoint.path)) from error


def _movable(expert: Expert, stored: str, spec: Spec) -> bool:
    """Whether a tensor takes part; MergeError for a trained one that the architecture does not have."""
    info = expert.checkpoint.tensors[stored]
    if not info.dtype.is_floating_point:
        return False
    if stored in spec.axes:
        return True
    if is_buffer(stored) and not stored.endswith(STATISTICS):
        return False
    raise MergeError(
        f"{expert.label} stores {stored!r}, which is no tensor of its architecture by itself",
        where=expert.checkpoint.place(stored),
        hint="load it with this version of transformers and save it again with save_original_format=False, or name it "
        "in the spec file (align.spec)",
    )


def _renaming(
    axes: Mapping[str, tuple[tuple[Factor, ...], ...]], spec: Spec, names: Mapping[str, str], first: str, label: str
) -> dict[str, str]:
    """An expert's groups by the first expert's names for them; MergeError where the two architectures differ."""
    known: dict[str, str] = {}
    for name, ours in axes.items():
        theirs = spec.axes.get(names[name], ())
        factors = list(zip([f for a in ours for f in leaves(a)], [f for a in theirs for f in leaves(a)], strict=False))
        same = [_layout(axis) for axis in ours] == [_layout(axis) for axis in theirs]
        for one, other in factors:
            same &= one.size == other.size and (one.group is None) == (other.group is None)
            if other.group is not None and one.group is not None:
                same &= known.setdefault(other.group, one.group) == one.group
        if not same:
            raise MergeError(
                f"{first} and {label} cannot be permuted alike there", where=name, hint="align one architecture"
            )
    return known


def _layout(axis: Sequence[Factor]) -> list[Any]:
    return [[_layout(part) for part in factor.parts] for factor in axis]


def _renamed(spec: Spec, known: Mapping[str, str], common: Spec, sizes: Mapping[str, tuple[int, ...]]) -> Spec:
    """An expert's spec with the common groups; groups of its head alone are frozen."""

    def factor(own: Factor) -> Factor:
        if own.parts:
            return join(tuple(factor(inner) for inner in part) for part in own.parts)
        group = known.get(own.group) if own.group else None
        return Factor(own.size, group, own.why if group or not own.group else "the head's own")

    def axis(tensor: str, dim: int, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
        found = tuple(factor(own) for own in factors)
        shape = sizes.get(tensor, ())
        if len(found) == 1 and not moves([found]) and dim < len(shape):
            # Heads have as many labels as their task, whatever the spec was written for.
            return (replace(found[0], size=shape[dim]),)
        return found

    axes = {
        name: tuple(axis(name, dim, factors) for dim, factors in enumerate(shape)) for name, shape in spec.axes.items()
    }
    return Spec(common.groups, axes, spec.reads)
