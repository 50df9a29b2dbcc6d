"""What an alignment leaves behind: its document, where each unit went, and what a person is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.alignment.batch_statistics import repairs
from modelweld.alignment.models import Member
from modelweld.alignment.scoring import STAND_IN
from modelweld.alignment.search import Found
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.shards import write_tensors
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.symmetry import Spec
from modelweld.symmetry.families import STATISTICS

DOCUMENT = "alignment.json"
PLACES = "alignment.safetensors"
ALIGNED_ALREADY = 0.999
_DIGITS = 6
_TOLD = (
    "mode",
    "alpha",
    "alpha_curve",
    "alpha_scored_by",
    "objective",
    "identity_share",
    "aligned_already",
    "order_of",
    "folded",
    "calibration",
    "proof_error",
    "preservation_error",
)


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

    def in_manifest(self, manifest: Mapping[str, Any], repair: Mapping[str, Any] | None) -> dict[str, Any]:
        """The manifest with what was aligned and repaired. The digest of the matching stands for rows and paths."""
        recipe = {**manifest["recipe"], "align": _without_places(manifest["recipe"]["align"])}
        told = {key: self.document[key] for key in _TOLD} | {"digest": self.digest()}
        return {**manifest, "recipe": recipe, "alignment": told, "repair": repair}

    def write(self, tree: Path) -> None:
        """Put alignment.json and alignment.safetensors into a merged directory."""
        text = json.dumps(self.document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        (tree / DOCUMENT).write_text(text + "\n", encoding="utf-8")
        write_tensors(tree / PLACES, dict(self.places), {})


def document_of(
    settings: Align, method_name: str, common: Spec, members: Sequence[Member], found: Found
) -> dict[str, Any]:
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
        "alpha_scored_by": None if curve is None else STAND_IN.method if found.stood_in else method_name,
        "models": [member.label for member in members],
        "order_of": members[0].label,
        "folded": [member.label for member in members if isinstance(member.checkpoint, Folded)],
        "objective": round(placement.objective, _DIGITS),
        "trace": [round(value, _DIGITS) for value in placement.trace],
        "identity_share": round(share, _DIGITS),
        "aligned_already": share >= ALIGNED_ALREADY,
        "groups": groups,
        "symmetry_digest": blake3(common.to_json().encode()).hexdigest(),
        "proof_error": {label: float(f"{error:.0e}") for label, error in found.proofs.items()},
        "preservation_error": {label: float(f"{error:.0e}") for label, error in found.preserved.items()},
        "calibration": found.calibration,
        "similarity": list(found.likeness),
    }


def unmoved(settings: Align, inputs: Inputs, why: str) -> Aligned:
    """The inputs as they are, with the record of an alignment that has nothing to move, or was not to move anything."""
    labels = [expert.label for expert in inputs.experts]
    document: dict[str, Any] = {
        "version": 1,
        "mode": settings.mode,
        "alpha": None,
        "alpha_curve": None,
        "alpha_scored_by": None,
        "models": labels,
        "order_of": labels[0],
        "folded": [],
        "objective": None,
        "trace": [],
        "identity_share": 1.0,
        "aligned_already": settings.mode != "none",
        "groups": {},
        "symmetry_digest": None,
        "proof_error": {},
        "preservation_error": {},
        "calibration": None,
        "similarity": [],
    }
    return Aligned(inputs, document, {}, (why,))


def places_of(members: Sequence[Member], found: Found) -> dict[str, Tensor]:
    """By model and group, as `<label>/<group>`, where units went: alignment.safetensors."""
    return {
        f"{member.label}/{name}": place.to(torch.int32).contiguous()
        for member, own in zip(members, found.placement.placed.places, strict=True)
        for name, place in own.items()
    }


def note_of(document: Mapping[str, Any]) -> str:
    """What a person is told of the alignment."""
    if document["aligned_already"]:
        return "the models are aligned already (units stay where they are): alignment changes nothing"
    return f"{document['identity_share']:.1%} of the units stay where they are in the order of {document['order_of']}"


def with_warnings(found: Aligned, settings: Align, plan: Plan) -> Aligned:
    """The same, with a word about what was left as it is."""
    notes = list(found.notes)
    if any(tensor.name.endswith(STATISTICS) for tensor in plan.tensors) and not repairs(settings, plan):
        notes.append("batch statistics are averages: name calibration rows to have them computed anew")
    return replace(found, notes=tuple(notes))


def _without_places(align: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The `align:` section without the places of its files, which differ from machine to machine."""
    if align is None:
        return None
    named = {key: sorted(align[key]) if align[key] else None for key in ("calibration", "validation")}
    return {**align, **named, "spec": align["spec"] is not None}
