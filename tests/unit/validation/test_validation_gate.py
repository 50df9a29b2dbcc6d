"""The gate file: sorted, stable, without what differs between two equal runs, and a refusal that can be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelweld.errors import GateRefused
from modelweld.formats.gate import Gate, Result, stable
from modelweld.validation.gate import refuse

GOOD = Result(subject="model:a", expectation="fine", critical=True, success=True, observed=1)
WARNED = Result(
    subject="model:a", expectation="odd", critical=False, success=False, observed=2, where="models/a", hint="look"
)
BAD = Result(
    subject="task:t",
    expectation="clean",
    critical=True,
    success=False,
    observed={"rows": 3, "examples": ["[red]"]},
    where="datasets/t: row 1",
    hint="drop them",
)


def test_a_warning_passes_and_a_critical_failure_does_not() -> None:
    assert Gate.of([GOOD, WARNED]).verdict == "pass"
    assert Gate.of([GOOD, WARNED, BAD]).verdict == "fail"


def test_the_file_does_not_depend_on_the_order_of_the_checks(tmp_path: Path) -> None:
    Gate.of([GOOD, WARNED, BAD]).write(tmp_path / "one/gate.json")
    Gate.of([BAD, GOOD, WARNED]).write(tmp_path / "two/gate.json")
    text = (tmp_path / "one/gate.json").read_bytes()
    assert text == (tmp_path / "two/gate.json").read_bytes()
    document = json.loads(text)
    assert document["version"] == 2
    assert [(item["subject"], item["expectation"]) for item in document["results"]] == [
        ("model:a", "fine"),
        ("model:a", "odd"),
        ("task:t", "clean"),
    ]


def test_a_file_linked_into_a_cache_is_replaced_not_written_into(tmp_path: Path) -> None:
    cached, gate = tmp_path / "cached", tmp_path / "gate.json"
    Gate.of([GOOD]).write(cached)
    before = cached.read_bytes()
    os.link(cached, gate)
    gate.chmod(0o444)
    Gate.of([BAD]).write(gate)
    assert cached.read_bytes() == before
    assert json.loads(gate.read_text())["verdict"] == "fail"


def test_the_refusal_shows_what_failed_where_and_how_to_mend_it() -> None:
    refuse(Gate.of([GOOD, WARNED]), Path("gate.json"))
    with pytest.raises(GateRefused) as error:
        refuse(Gate.of([GOOD, WARNED, BAD]), Path("gate.json"))
    for told in ("1 critical expectation failed", "task:t", "datasets/t: row 1", "drop them", "[red]"):
        assert told in error.value.what
    assert "models/a" not in error.value.what
    assert error.value.exit_code == 1


def test_a_long_refusal_is_cut_and_says_so() -> None:
    many = [BAD.model_copy(update={"subject": f"model:m{number}"}) for number in range(40)]
    with pytest.raises(GateRefused, match="and 15 more in the gate file"):
        refuse(Gate.of(many), Path("gate.json"))


def test_observed_values_are_plain_json() -> None:
    value = {"a": np.float64(1 / 3), "b": (np.int64(2), np.bool_(True)), "c": float("nan"), "d": float("inf"), 5: None}
    assert stable(value) == {"a": 0.333333, "b": [2, True], "c": None, "d": "inf", "5": None}
    json.dumps(stable(value), allow_nan=False)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_settled_after_one_time(value: float) -> None:
    assert stable(stable(value)) == stable(value)
