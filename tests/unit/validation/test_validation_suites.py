"""Suites as files: what ships is sound, a project changes it knowingly, and a mistake in a file is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelweld.errors import ConfigError
from modelweld.validation.suites import load_suite, load_suites
from modelweld.validation.tables import SUITES


def write(project: Path, name: str, text: str) -> Path:
    folder = project / "expectations"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return project


OWN = "{id: brief, type: expect_column_value_lengths_to_be_between, kwargs: {column: text, max_value: 9}, hint: cut}"


def test_shipped_suites_cover_every_table(tmp_path: Path) -> None:
    suites = load_suites(tmp_path)
    assert set(suites) == set(SUITES)
    assert {item.id for item in suites["tensors"]} >= {"tensors_are_finite", "same_shapes", "no_tensor_is_missing"}
    ids = [item.id for items in suites.values() for item in items]
    assert len(ids) == len(set(ids)), "an id names one expectation in the whole gate file"


def test_a_project_extends_replaces_and_leaves_out(tmp_path: Path) -> None:
    text = f"""
table: evaluation
extends: default
without: [labels_agree]
expectations:
  - {OWN}
  - {{id: enough_rows, type: expect_table_row_count_to_be_between, kwargs: {{min_value: 3}}, hint: add rows}}
"""
    shipped = {item.id for item in load_suite("evaluation", tmp_path)}
    changed = {item.id: item for item in load_suite("evaluation", write(tmp_path, "evaluation.yaml", text))}
    assert set(changed) == (shipped - {"labels_agree"}) | {"brief"}
    assert changed["enough_rows"].kwargs == {"min_value": 3}


def test_a_project_may_stand_alone(tmp_path: Path) -> None:
    write(tmp_path, "evaluation.yaml", f"table: evaluation\nexpectations: [{OWN}]\n")
    assert [item.id for item in load_suite("evaluation", tmp_path)] == ["brief"]


def test_an_aligning_method_lifts_the_finetune_expectation_to_a_warning(tmp_path: Path) -> None:
    def severity(method: str | None) -> dict[str, str]:
        return {item.id: item.severity for item in load_suite("checkpoint", tmp_path, lifting=method)}

    assert severity("drm")["finetuned_from_base"] == severity(None)["finetuned_from_base"] == "critical"
    assert severity("mudsc")["finetuned_from_base"] == "warning"
    assert severity("mudsc")["same_architecture"] == "critical"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("evaluations.yaml", "table: evaluation", "no suite of this name"),
        ("tensors.yaml", "table: evaluation", "table: evaluation in a file for tensors"),
        ("tensors.yaml", "table: [", "not valid YAML"),
        ("tensors.yaml", "table: tensors\nexpectation: []", "expectation: Extra inputs"),
        ("tensors.yaml", "table: tensors\nextends: default\nwithout: [nothing]", "no expectation 'nothing'"),
        ("evaluation.yaml", f"table: evaluation\nexpectations: [{OWN}, {OWN}]", "share the id 'brief'"),
        ("tensors.yaml", "table: tensors\nexpectations: [{id: a, type: b, hint: 'see {here}'}]", "cannot be filled in"),
        ("tensors.yaml", "- a list", "Input should be"),
    ],
)
def test_a_mistake_in_a_suite_file_is_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        load_suites(write(tmp_path, name, text))
    assert name in str(error.value.where)
    assert error.value.hint


def test_this_projects_own_suites_load() -> None:
    project = Path(__file__).parents[3]
    assert "texts_are_not_whole_mailboxes" in {item.id for item in load_suites(project)["evaluation"]}
