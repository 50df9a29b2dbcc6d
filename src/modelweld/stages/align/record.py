"""What an alignment leaves behind: its document, where each unit went, and what a person is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints.shards import write_tensors
from modelweld.config.align import Align
from modelweld.merging.engine import Inputs, Plan
from modelweld.stages.align.members import Member
from modelweld.stages.align.search import Found
from modelweld.symmetry import Spec
from modelweld.symmetry.families import STATISTICS

DOCUMENT = "alignment.json"
PLACES = "alignment.safetensors"
ALIGNED_ALREADY = 0.999
_DIGITS = 6


@dataclass(frozen=True)
class Aligned:
    """Inputs in one order, and the record of how they came there."""

    inputs: Inputs
    document: Mapping[str, Any]
    places: Mapping[str, Tensor]
    notes: tuple[str, ...]

    def digest(self) -> str:
        """BLAKE3 over what was matched to what."""
        hasher = blake3(json.dumps(self.document, sort_keys=True).encode())
        for name, place in sorted(self.places.items()):
            hasher.update(f"{name}\0".encode() + place.numpy().tobytes())
        return str(hasher.hexdigest())

    def write(self, tree: Path) -> None:
        """Put alignment.json and alignment.safetensors into a merged directory."""
        text = json.dumps(self.document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        (tree / DOCUMENT).write_text(text + "\n", encoding="utf-8")
        write_tensors(tree / PLACES, dict(self.places), {})


def document_of(settings: Align, common: Spec, members: Sequence[Member], found: Found) -> dict[str, Any]:
    """alignment.json: what was done and what it gave, without clocks."""
    placement, curve = found.placement, found.curve
    shares, share = placement.identity_shares(), placement.identity_share()
    groups = {
        name: {
            "size": group.size,
            "within": list(group.within),
            "matched": round(placement.matched[name], _DIGITS) if name in placement.matched else None,
            "identity_share": round(shares[name], _DIGITS),
        }
        for name, group in common.groups.items()
    }
    return {
        "version": 1,
        "mode": settings.mode,
        "alpha": found.alpha,
        "alpha_curve": None if curve is None else {f"{key:g}": round(score, _DIGITS) for key, score in curve.items()},
        "models": [member.label for member in members],
        "order_of": members[0].label,
        "objective": round(placement.objective, _DIGITS),
        "trace": [round(value, _DIGITS) for value in placement.trace],
        "identity_share": round(share, _DIGITS),
        "aligned_already": share >= ALIGNED_ALREADY,
        "groups": groups,
        "symmetry_digest": blake3(common.to_json().encode()).hexdigest(),
        "proof_error": {label: float(f"{error:.0e}") for label, error in found.proofs.items()},
        "preservation_error": {label: float(f"{error:.0e}") for label, error in found.preserved.items()},
        "calibration": found.calibration,
    }


def places_of(members: Sequence[Member], found: Found) -> dict[str, Tensor]:
    """By model and group, as `<label>/<group>`, where units went: alignment.safetensors."""
    return {
        f"{member.label}/{name}": place.to(torch.int32).contiguous()
        for member, own in zip(members, found.placement.placed.places, strict=True)
        for name, place in own.items()
    }


def notes_of(document: Mapping[str, Any], plan: Plan) -> tuple[str, ...]:
    """What a person is told."""
    share, order = document["identity_share"], document["order_of"]
    notes = [f"{share:.1%} of the units stay where they are in the order of {order}"]
    if document["aligned_already"]:
        notes = ["the models are aligned already (units stay where they are): alignment changes nothing"]
    if any(tensor.name.endswith(STATISTICS) for tensor in plan.tensors):
        notes.append("batch statistics are averages: compute them anew with modelweld.symmetry.repair")
    return tuple(notes)
