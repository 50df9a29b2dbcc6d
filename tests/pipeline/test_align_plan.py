"""`modelweld plan` prices an alignment: what it forwards, compares and holds, counted without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelweld.alignment.cost import AlignmentCost
from modelweld.cli.app import main
from modelweld.errors import MergeError
from modelweld.stages.plan import plan
from tests.conftest import Family

TASKS = 2


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(family: Family, **changes: Any) -> Path:
    models = {task: {"path": str(family.expert(task))} for task in family.tasks}
    document = {"method": "mudsc", "base": str(family.base), "models": models, **changes}
    Path("recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return Path("recipe.yaml")


def priced(family: Family, **changes: Any) -> AlignmentCost:
    found = plan(recipe(family, **changes), Path("merged")).alignment
    assert found is not None
    return found


def rows(family: Family, split: str = "train") -> dict[str, Any]:
    return {task: {"dataset": str(family.dataset(task)), "split": split} for task in family.tasks}


def test_rows_are_counted_over_models_and_values_of_alpha(tiny_bert_family: Family) -> None:
    weights = priced(tiny_bert_family)
    assert (weights.forwarded, weights.forward_flops, weights.disk_bytes) == (0, 0.0, 0)
    few = {"calibration": rows(tiny_bert_family), "rows": 32, "max_length": 16}
    dual = priced(tiny_bert_family, align=few)
    assert dual.forwarded == 2 * 32
    # A BERT of 2 layers: 4 h² for attention and 4 h² for the MLP of twice the width, a multiplication and an addition.
    least = 32 * 2 * 16 * 2 * 2 * (4 + 4) * 32**2
    assert least < dual.forward_flops < 2 * least
    assert dual.similarity_flops > weights.similarity_flops
    searched = few | {"alpha": "auto", "grid": [0.2, 0.8], "validation": rows(tiny_bert_family, "validation")}
    auto = priced(tiny_bert_family, align=searched | {"validation_rows": 10})
    assert auto.forwarded == 2 * 32 + 2 * TASKS * 10
    assert auto.matches == 2 * dual.matches
    # Hidden units are twice as many as those of the residual stream, and the vocabulary is tiny.
    assert "intermediate" in dual.group
    assert dual.group_units == 64


def test_zip_compares_all_units_and_a_base_is_one_model_more(tiny_bert_family: Family) -> None:
    align, zipped = (priced(tiny_bert_family, align={"mode": mode}) for mode in ("align", "zip"))
    assert zipped.group_bytes > align.group_bytes
    # All units of both models with all, in three times as many sweeps.
    assert zipped.similarity_flops == pytest.approx(3 * 4 * align.similarity_flops)
    assert priced(tiny_bert_family, method="task_arithmetic", align={}).models == 3


def test_a_merge_that_permutes_nothing_has_no_price(tiny_bert_family: Family) -> None:
    assert plan(recipe(tiny_bert_family, method="average"), Path("merged")).alignment is None
    none = {"mode": "none", "calibration": rows(tiny_bert_family)}
    assert plan(recipe(tiny_bert_family, method="average", align=none), Path("merged")).alignment is None


def test_the_command_tells_it_to_people_and_machines(
    tiny_bert_family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tiny_bert_family, align={"calibration": rows(tiny_bert_family), "rows": 32})
    main_code(["plan", str(file), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["alignment"]["forwarded"] == 64
    assert document["needs"]["seconds"] >= document["alignment"]["seconds"]
    main_code(["plan", str(file)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "alignment of 2 models" in shown
    assert "64 rows forwarded" in shown


def main_code(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code


def test_what_the_merge_would_refuse_is_refused_here(tiny_bert_family: Family) -> None:
    file = recipe(tiny_bert_family, method="task_arithmetic", align={"mode": "zip"})
    with pytest.raises(MergeError, match="reads the base"):
        plan(file, Path("merged"))
