"""The evaluate stage on real merges: its two files, its cache, its refusals, and the commands that look at a merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score

from modelweld import hardware
from modelweld.cli import main
from modelweld.errors import CheckpointError, ConfigError, InputError
from modelweld.evaluation import TaskScores, scoreboard
from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge_baselines, merge_pipeline
from modelweld.stages.report import report
from tests.conftest import Family, pipeline_params

BASELINES = {"average": {"method": "average"}, "ties": {"method": "ties"}}


@pytest.fixture(scope="module")
def merged_project(tiny_bert_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose merge stages ran: read it, copy it to write into it."""
    root = tmp_path_factory.mktemp("merged-project")
    for name in ("models", "datasets"):
        shutil.copytree(tiny_bert_family.root / name, root / name)
    (root / "params.yaml").write_text(pipeline_params(tiny_bert_family, baselines=BASELINES))
    merge_pipeline(root / "params.yaml", root)
    merge_baselines(root / "params.yaml", root)
    return root


@pytest.fixture
def project(merged_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    return Path(shutil.copytree(merged_project, tmp_path / "project"))


def run(root: Path, task: str = "animal") -> dict[str, Any]:
    return evaluate(task, root / "params.yaml", root)


def outputs(root: Path) -> dict[str, bytes]:
    files = [*root.glob("scores/*"), *root.glob("predictions/*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}


def entries(root: Path) -> list[Path]:
    return sorted(root.glob(".modelweld/cache/predictions/*"))


def rewrite(root: Path, change: dict[str, Any], task: str = "animal") -> None:
    document = json.loads((root / "params.yaml").read_text())
    document["tasks"][task] |= change
    (root / "params.yaml").write_text(json.dumps(document))


def test_scores_and_predictions_tell_one_story(project: Path) -> None:
    document = run(project)
    assert json.loads((project / "scores/animal.json").read_text()) == document
    assert document["task"] == "animal"
    assert document["rows"] == 60
    frame = pd.read_parquet(project / "predictions/animal.parquet")
    names = ["base", "expert", "average", "ties", "merged"]
    assert list(frame.columns) == ["row", "label"] + [f"{n}{c}" for n in names for c in ("", ".confidence")]
    truth = pd.read_parquet(project / "datasets/animal/test.parquet")["label"]
    assert list(frame["label"]) == [["cat", "dog", "cow"][number] for number in truth]
    for name in names:
        entry = document["systems"][name]
        right = accuracy_score(frame["label"], frame[name])
        assert entry["accuracy"]["value"] == pytest.approx(right, abs=1e-6)
        assert entry["accuracy"]["low"] <= right <= entry["accuracy"]["high"]
        expert = document["systems"]["expert"]["accuracy"]["value"]
        assert entry["normalised"] == pytest.approx(right / expert, abs=1e-5)
        assert frame[f"{name}.confidence"].between(1 / 3 - 1e-3, 1).all()
    assert document["systems"]["expert"]["accuracy"]["value"] > 0.8
    assert len({entry["model_digest"] for entry in document["systems"].values()}) == len(names)


def test_the_merge_is_scored_as_transformers_scores_it(project: Path) -> None:
    import torch

    import modelweld
    from modelweld.checkpoints.loading import load_tokenizer

    run(project)
    texts = list(pd.read_parquet(project / "datasets/animal/test.parquet")["text"])
    model = modelweld.load(project / "merged", task="animal")
    with torch.inference_mode():
        logits = model(**load_tokenizer(project / "merged")(texts, padding=True, return_tensors="pt")).logits
    expected = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    assert list(pd.read_parquet(project / "predictions/animal.parquet")["merged"]) == expected


def test_bytes_are_the_same_with_a_full_a_spoilt_and_no_cache(project: Path) -> None:
    run(project)
    first, kept = outputs(project), entries(project)
    assert len(kept) == 5

    before = [path.stat().st_mtime_ns for path in kept]
    run(project)
    assert outputs(project) == first
    assert [path.stat().st_mtime_ns for path in kept] == before, "a full cache is not written again"

    for index, path in enumerate(kept):
        raw = path.read_bytes()
        path.write_bytes([raw[:40], b"", raw.replace(b"modelweld.seal", b"modelweld.seam"), raw[:-9], raw][index])
    run(project)
    assert outputs(project) == first

    shutil.rmtree(project / ".modelweld")
    run(project)
    assert outputs(project) == first


def test_only_what_changed_is_predicted_again(project: Path) -> None:
    run(project)
    kept = {path: path.stat().st_mtime_ns for path in entries(project)}
    shutil.rmtree(project / "merged")
    shutil.copytree(project / "baselines/ties", project / "merged")
    run(project)
    now = entries(project)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(now) == len(kept), "the merge is now the very model that was scored as ties"
    rewrite(project, {"max_length": 12})
    run(project)
    assert len(entries(project)) == len(kept) + 4, "base, expert, average, and one for ties and merge alike"


def test_slow_half_precision_becomes_float32_and_scores_say_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "gflops", lambda precision, device: 35.0 if precision == "float32" else 0.7)
    exact = run(project)
    assert exact["precision"] == {"requested": "float32", "used": "float32"}
    first, kept = outputs(project), entries(project)

    precision(project, "bfloat16")
    replaced = run(project)
    assert "0.7 GFLOP/s in bfloat16, 35.0 in float32" in caplog.text
    assert replaced["precision"] == {"requested": "bfloat16", "used": "float32"}
    assert replaced | {"precision": None} == exact | {"precision": None}
    assert entries(project) == kept, "the predictions are those of float32"

    precision(project, "bfloat16!")
    assert run(project)["precision"] == {"requested": "bfloat16!", "used": "bfloat16"}
    assert outputs(project)["predictions/animal.parquet"] != first["predictions/animal.parquet"]
    assert len(entries(project)) == 2 * len(kept), "no prediction of the other precision was served"

    precision(project, "float32")
    run(project)
    assert outputs(project) == first
    assert TaskScores.read(project / "scores/animal.json").data() == exact


def precision(root: Path, wanted: str) -> None:
    document = json.loads((root / "params.yaml").read_text())
    document["evaluate"] |= {"precision": wanted}
    (root / "params.yaml").write_text(json.dumps(document))


def test_the_cache_belongs_to_the_project_not_to_the_worktree(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(home))
    run(project)
    assert not entries(project)
    assert len(entries(home)) == 5


def test_labels_by_name_score_alike(project: Path) -> None:
    by_number = run(project)
    path = project / "datasets/animal/test.parquet"
    frame = pd.read_parquet(path)
    frame["label"] = [["cat", "dog", "cow"][number] for number in frame["label"]]
    path.unlink()
    frame.to_csv(project / "datasets/animal/test.csv", index=False)
    by_name = run(project)
    assert by_name["dataset_digest"] != by_number["dataset_digest"]
    assert by_name["systems"] == by_number["systems"]


def test_refusals_write_nothing(project: Path) -> None:
    path = project / "datasets/animal/test.parquet"
    frame = pd.read_parquet(path)
    frame.loc[7, "label"] = 3
    frame.to_parquet(path)
    with pytest.raises(InputError, match=r"task animal, row 7: label 3 is none of the head's 3 classes"):
        run(project)
    with pytest.raises(ConfigError, match="no task 'plant'"):
        run(project, "plant")
    assert outputs(project) == {}


def test_a_merge_without_the_head_is_refused(project: Path) -> None:
    shutil.rmtree(project / "merged/heads/animal")
    with pytest.raises(ConfigError, match="no head for task 'animal'"):
        run(project)
    shutil.rmtree(project / "merged")
    with pytest.raises(CheckpointError, match="merged"):
        run(project)
    assert outputs(project) == {}


def test_a_head_with_other_classes_is_refused(project: Path) -> None:
    config = project / "merged/heads/animal/config.json"
    document = json.loads(config.read_text())
    swapped = {"0": "dog", "1": "cat", "2": "cow"}
    config.write_text(
        json.dumps(document | {"id2label": swapped, "label2id": {name: int(n) for n, name in swapped.items()}})
    )
    with pytest.raises(CheckpointError, match=r"classes \['dog', 'cat', 'cow'\], the expert's \['cat', 'dog', 'cow'\]"):
        run(project)


def test_a_baseline_may_not_take_the_name_of_a_column(project: Path) -> None:
    (project / "baselines/average").rename(project / "baselines/label")
    with pytest.raises(ConfigError, match="may not be named 'label'"):
        run(project)


def test_the_report_tells_the_whole_story(project: Path) -> None:
    for task in ("animal", "colour"):
        run(project, task)
    document = report(project)
    page = project / ".modelweld/report/index.html"
    assert document["report"] == str(page)
    assert document["scores"] == scoreboard(project).summary().data()
    text = page.read_text(encoding="utf-8")
    manifest = json.loads((project / "merged/manifest.json").read_text())
    for expected in ("tiny", "ties", manifest["output"]["model_digest"], "drop_rate: 0.5", "animal", "colour"):
        assert expected in text
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text.replace("http-equiv", ""), "the page needs no network"
    assert (project / ".modelweld/report/scores.png").stat().st_size > 10_000
    first = page.read_bytes()
    report(project)
    assert page.read_bytes() == first

    shutil.rmtree(project / "merged")
    shutil.rmtree(project / "predictions")
    report(project, project / "bare", "A title with <b>")
    bare = (project / "bare/index.html").read_text(encoding="utf-8")
    assert "A title with &lt;b&gt;" in bare
    assert "Lineage" not in bare


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    return int(leaving.value.code or 0), capsys.readouterr().out


def test_the_commands_of_a_person(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    scores = run(project)["systems"]

    code, out = command(capsys, "evaluate", "merged", "--task", "animal", "--expert", "models/animal", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["systems"]["model"]["accuracy"] == scores["merged"]["accuracy"]
    assert document["systems"]["model"]["normalised"] == scores["merged"]["normalised"]

    code, out = command(capsys, "export", "exported", "--task", "animal", "--json")
    assert (code, json.loads(out)["out"]) == (0, "exported")
    rows = "datasets/animal/test.parquet"
    code, out = command(capsys, "evaluate", "exported", "--dataset", rows, "--metric", "macro_f1", "--json")
    document = json.loads(out)
    assert (code, document["metric"], document["task"]) == (0, "macro_f1", "exported")
    assert document["systems"]["model"]["macro_f1"]["value"] == scores["merged"]["macro_f1"]["value"]

    code, out = command(capsys, "report", "--out", "page")
    assert code == 0
    assert "page/index.html" in out

    code, out = command(capsys, "evaluate", "merged", "--json")
    assert (code, json.loads(out)["what"]) == (2, "nothing says which dataset")
    code, out = command(capsys, "evaluate", "merged", "--dataset", rows, "--json")
    assert (code, json.loads(out)["what"]) == (2, "it holds several heads")
    code, out = command(capsys, "evaluate", "merged", "--task", "plant", "--dataset", rows, "--json")
    assert (code, json.loads(out)["what"]) == (2, "no head for task 'plant'")
    code, out = command(capsys, "evaluate", "merged", "--task", "animal", "--expert", "models/colour", "--json")
    assert (code, json.loads(out)["what"]) == (2, "its classes are not those of the model")
    code, _ = command(capsys, "export", "exported", "--task", "animal", "--json")
    assert code == 2


def test_more_rows_make_narrower_intervals(project: Path) -> None:
    few = run(project)["systems"]["average"]["accuracy"]
    path = project / "datasets/animal/test.parquet"
    frame = pd.read_parquet(path)
    pd.concat([frame] * 9).to_parquet(path, index=False)
    many = run(project)["systems"]["average"]["accuracy"]
    assert many["value"] == pytest.approx(few["value"], abs=1e-6)
    assert np.subtract(many["high"], many["low"]) < np.subtract(few["high"], few["low"]) / 2
