"""What an alignment writes: its document, the assignment of every unit, and notes for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.alignment.batch_statistics import recomputes_statistics
from modelweld.alignment.models import AlignedModel
from modelweld.alignment.scoring import STAND_IN
from modelweld.alignment.search import Found
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.shards import disk_errors, write_tensors
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.formats.alignment import FILE, AlignmentRecord, UnitGroup
from modelweld.formats.manifest import AlignmentSummary
from modelweld.symmetry import Spec
from modelweld.symmetry.families import STATISTICS

ASSIGNMENTS = "alignment.safetensors"
ALIGNED_ALREADY = 0.999
_DIGITS = 6


@dataclass(frozen=True)
class Aligned:
    """Inputs with all units in one order, and the record of how they were matched."""

    inputs: Inputs
    record: AlignmentRecord
    assignments: Mapping[str, Tensor]
    notes: tuple[str, ...]

    def digest(self) -> str:
        """BLAKE3 over the record and all assignments."""
        hasher = blake3(json.dumps(self.record.data(), sort_keys=True).encode())
        for name, assignment in sorted(self.assignments.items()):
            hasher.update(f"{name}\0".encode() + assignment.numpy().tobytes())
        return str(hasher.hexdigest())

    def summary(self) -> AlignmentSummary:
        """The manifest's `alignment`: the record without its details, and the digest of the whole."""
        fields = {key: getattr(self.record, key) for key in AlignmentSummary.model_fields if key != "digest"}
        return AlignmentSummary(**fields, digest=self.digest())

    def write(self, tree: Path) -> None:
        """Put alignment.json and alignment.safetensors into a merged directory."""
        with disk_errors(tree / FILE):
            self.record.write(tree / FILE)
        write_tensors(tree / ASSIGNMENTS, dict(self.assignments), {})


def record_of(
    settings: Align, method_name: str, common: Spec, models: Sequence[AlignedModel], found: Found
) -> AlignmentRecord:
    """alignment.json: settings, results and errors of the alignment, without clocks."""
    placement, curve = found.placement, found.curve
    shares, share = placement.identity_shares(), placement.identity_share()
    groups = {
        name: UnitGroup(
            size=group.size,
            within=tuple(group.within),
            matched=round(placement.matched[name], _DIGITS) if name in placement.matched else None,
            identity_share=round(shares[name], _DIGITS),
        )
        for name, group in common.groups.items()
    }
    return AlignmentRecord(
        mode=settings.mode,
        alpha=found.alpha,
        alpha_curve=None if curve is None else {f"{key:g}": round(score, _DIGITS) for key, score in curve.items()},
        alpha_scored_by=None if curve is None else STAND_IN.method if found.stood_in else method_name,
        models=tuple(model.label for model in models),
        order_of=models[0].label,
        folded=tuple(model.label for model in models if isinstance(model.checkpoint, Folded)),
        objective=round(placement.objective, _DIGITS),
        trace=tuple(round(value, _DIGITS) for value in placement.trace),
        identity_share=round(share, _DIGITS),
        aligned_already=share >= ALIGNED_ALREADY,
        groups=groups,
        symmetry_digest=blake3(common.to_json().encode()).hexdigest(),
        proof_error={label: float(f"{error:.0e}") for label, error in found.invariance_errors.items()},
        preservation_error={label: float(f"{error:.0e}") for label, error in found.preserved.items()},
        calibration=found.calibration,
        similarity=tuple(found.similarity),
    )


def identity_alignment(settings: Align, inputs: Inputs, why: str) -> Aligned:
    """The inputs unchanged, with the record of an alignment that permutes nothing."""
    labels = tuple(expert.label for expert in inputs.experts)
    record = AlignmentRecord(
        mode=settings.mode,
        models=labels,
        order_of=labels[0],
        identity_share=1.0,
        aligned_already=settings.mode != "none",
    )
    return Aligned(inputs, record, {}, (why,))


def assignments_of(models: Sequence[AlignedModel], found: Found) -> dict[str, Tensor]:
    """By model and group, as `<label>/<group>`, the assignment of its units: alignment.safetensors."""
    return {
        f"{model.label}/{name}": assignment.to(torch.int32).contiguous()
        for model, own in zip(models, found.placement.placed.assignments, strict=True)
        for name, assignment in own.items()
    }


def note_of(record: AlignmentRecord) -> str:
    """One line for people about the alignment."""
    if record.aligned_already:
        return "the models are aligned already (units stay where they are): alignment changes nothing"
    return f"{record.identity_share:.1%} of the units stay where they are in the order of {record.order_of}"


def with_warnings(found: Aligned, settings: Align, plan: Plan) -> Aligned:
    """The same, with a note if batch statistics are averaged rather than recomputed."""
    notes = list(found.notes)
    if any(tensor.name.endswith(STATISTICS) for tensor in plan.tensors) and not recomputes_statistics(settings, plan):
        notes.append("batch statistics are averages: name calibration rows to have them recomputed")
    return replace(found, notes=tuple(notes))
