"""Spec files written by hand: what does not fit is refused by group or tensor before anything is permuted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelweld.alignment.specs import load_spec
from modelweld.errors import MergeError
from modelweld.symmetry import Factor, Group, Spec
from modelweld.symmetry.spec import join

HEADS, DIMS, UNITS, FREE = Factor(2, "heads"), Factor(3, "dims"), Factor(5, "units"), Factor(4, None, "labels")
SPEC = Spec(
    {"heads": Group("heads", 2), "dims": Group("dims", 3, ("heads",)), "units": Group("units", 5)},
    {
        "qkv": ((join([(HEADS, DIMS), (HEADS, DIMS)]),), (UNITS,)),
        "head": ((FREE,), (UNITS,)),
    },
)
Change = Callable[[dict[str, Any]], Any]


def written(tmp_path: Path, change: Change) -> Path:
    document = json.loads(SPEC.to_json())
    change(document)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(document))
    return file


def test_a_spec_with_packed_parts_survives_its_file(tmp_path: Path) -> None:
    assert load_spec(written(tmp_path, lambda _: None)) == SPEC


CHANGES: dict[str, tuple[Change, str]] = {
    "unknown group": (lambda d: d["axes"]["head"][1][0].update(group="nobody"), "head, axis 1: names the group nobody"),
    "does not divide": (
        lambda d: d["groups"]["units"].update(size=7),
        "head, axis 1: has 5 units of units, which has 7",
    ),
    "unknown outer": (lambda d: d["groups"]["units"].update(within=["nobody"]), "group units: lies within nobody"),
    "itself": (lambda d: d["groups"]["units"].update(within=["units"]), "group units: lies within units"),
    "three levels": (lambda d: d["groups"]["units"].update(within=["dims"]), "group units: lies within dims"),
    "outer elsewhere": (lambda d: d["groups"]["units"].update(within=["heads"]), "head: a group inside of heads"),
    "empty axis": (lambda d: d["axes"]["head"].__setitem__(0, []), "head, axis 0: has no factors"),
    "parts in front": (lambda d: d["axes"]["qkv"][0].append({"size": 1}), "qkv, axis 0: parts may only come last"),
    "parts": (lambda d: d["axes"]["qkv"][0][0].update(size=13), "qkv, axis 0: its parts do not add up"),
    "no group": (lambda d: d.pop("groups"), "groups: Field required"),
    "no number": (
        lambda d: d["groups"]["units"].update(size="many"),
        r"groups\.units\.size: Input should be a valid int",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    with pytest.raises(MergeError, match=rf"spec\.json.*{expected}"):
        load_spec(written(tmp_path, change))


@pytest.mark.parametrize(("text", "expected"), [("{", "Invalid JSON"), ("[]", "an object"), (None, "No such file")])
def test_what_is_no_spec_file_is_refused(text: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(MergeError, match=rf"spec\.json.*{expected}") as error:
        load_spec(file)
    assert "--spec" in str(error.value.hint)
