"""Scores are the library's, intervals are a bootstrap's, and systems are compared on the same rows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score

from modelweld.errors import InputError
from modelweld.evaluation import Interval, Scoreboard, TaskScores, scoreboard
from modelweld.evaluation.labels import Classes
from modelweld.evaluation.metrics import Resampling, macro_f1, score_systems
from modelweld.evaluation.significance import mcnemar

RESAMPLING = Resampling(resamples=2000, confidence=0.9, seed=3)


def drawn(rows: int = 400, classes: int = 4, seed: int = 0) -> tuple[Classes, dict[str, Classes]]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, classes, rows)
    guesses = {
        name: np.where(generator.random(rows) < right, truth, generator.integers(0, classes, rows))
        for name, right in {"base": 0.2, "expert": 0.9, "average": 0.5, "merged": 0.8}.items()
    }
    return truth, guesses


def scored(resampling: Resampling = RESAMPLING, **options: int) -> TaskScores:
    truth, guesses = drawn(**options)
    systems = score_systems(truth, guesses, dict.fromkeys(guesses, "digest"), "accuracy", resampling, "task t")
    return TaskScores(
        task="t",
        dataset_digest="data",
        rows=len(truth),
        metric="accuracy",
        confidence=resampling.confidence,
        bootstrap=resampling.resamples,
        systems=systems,
    )


def test_values_are_those_of_scikit_learn() -> None:
    truth, guesses = drawn()
    for name, scores in scored().systems.items():
        assert scores.accuracy.value == pytest.approx(accuracy_score(truth, guesses[name]), abs=1e-6)
        assert scores.macro_f1.value == pytest.approx(f1_score(truth, guesses[name], average="macro"), abs=1e-6)


def test_intervals_agree_with_scipy() -> None:
    truth, guesses = drawn()
    merged = scored().systems["merged"]
    for metric, statistic in {
        "accuracy": lambda rows: accuracy_score(truth[rows], guesses["merged"][rows]),
        "macro_f1": lambda rows: f1_score(truth[rows], guesses["merged"][rows], average="macro"),
        "relative": lambda rows: (
            accuracy_score(truth[rows], guesses["merged"][rows]) / accuracy_score(truth[rows], guesses["expert"][rows])
        ),
    }.items():
        reference = bootstrap(
            (np.arange(len(truth)),),
            statistic,
            vectorized=False,
            n_resamples=600,
            confidence_level=0.9,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        ours = getattr(merged, metric)
        assert ours.low == pytest.approx(reference.low, abs=0.012)
        assert ours.high == pytest.approx(reference.high, abs=0.012)


def test_the_expert_is_exactly_its_own_measure() -> None:
    expert = scored().systems["expert"]
    assert expert.relative == Interval(value=1.0, low=1.0, high=1.0)
    assert expert.versus_expert.p_value == 1.0


def test_pairing_makes_the_share_surer_than_two_separate_samples_would() -> None:
    truth, guesses = drawn(rows=1000)
    guesses["merged"] = np.where(np.arange(1000) % 50 == 0, (truth + 1) % 4, guesses["expert"])
    merged = score_systems(truth, guesses, dict.fromkeys(guesses, ""), "accuracy", RESAMPLING, "t")["merged"]
    share = merged.relative.high - merged.relative.low
    alone = merged.accuracy.high - merged.accuracy.low
    assert share < alone / 1.5


def test_chunks_do_not_change_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored()
    monkeypatch.setattr("modelweld.evaluation.metrics._CELLS", 400 * 7)
    assert scored() == whole


def test_seeds_change_intervals_only() -> None:
    one, other = scored(), scored(dataclasses.replace(RESAMPLING, seed=4))
    assert one != other
    for name in one.systems:
        assert one.systems[name].accuracy.value == other.systems[name].accuracy.value


def test_without_resampling_there_are_no_intervals() -> None:
    merged = scored(Resampling(0, 0.95, 0)).systems["merged"]
    assert (merged.accuracy.low, merged.accuracy.high) == (None, None)
    assert merged.normalised > 0.5


def test_macro_f1_averages_over_the_classes_of_the_truth() -> None:
    truth = np.array([0, 0, 1, 1])
    # Class 2 is never right, but it is not a class of this set: a guess of it is a miss, not a third of the mean.
    assert macro_f1(truth, np.array([0, 0, 1, 2])) == pytest.approx((1 + 2 / 3) / 2)


def test_classes_outside_the_truth_count_as_wrong_when_resampled() -> None:
    truth = np.array([1, 1, 3, 3] * 25)
    guesses = {"expert": truth, "low": np.zeros(100, dtype=np.int64), "high": np.full(100, 9)}
    systems = score_systems(truth, guesses, dict.fromkeys(guesses, ""), "accuracy", RESAMPLING, "t")
    for name in ("low", "high"):
        assert (systems[name].accuracy.high, systems[name].macro_f1.high) == (0.0, 0.0)
    assert systems["expert"].macro_f1.low == 1.0


def test_an_expert_that_is_never_right_is_refused() -> None:
    truth = np.zeros(10, dtype=np.int64)
    guesses = {"expert": np.ones(10, dtype=np.int64)}
    with pytest.raises(InputError, match="task mails: the accuracy of the expert is 0"):
        score_systems(truth, guesses, {"expert": ""}, "accuracy", RESAMPLING, "task mails")


@pytest.mark.parametrize(("only_this", "only_expert"), [(0, 0), (1, 9), (9, 1), (5, 5), (0, 30)])
def test_mcnemar_is_the_exact_binomial(only_this: int, only_expert: int) -> None:
    this = np.array([True] * only_this + [False] * only_expert + [True, False])
    expert = np.array([False] * only_this + [True] * only_expert + [True, False])
    test = mcnemar(this, expert)
    assert (test.only_this, test.only_expert) == (only_this, only_expert)
    discordant, fewer = only_this + only_expert, min(only_this, only_expert)
    tail = sum(comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    assert test.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-5)


def board(tmp_path: Path) -> Scoreboard:
    for task, seed in {"b": 1, "a": 2}.items():
        scored(seed=seed).model_copy(update={"task": task}).write(tmp_path / "scores" / f"{task}.json")
    return scoreboard(tmp_path)


def test_scores_survive_the_file(tmp_path: Path) -> None:
    scores = scored()
    path = tmp_path / "scores" / "t.json"
    scores.write(path)
    assert TaskScores.read(path) == scores
    document = json.loads(path.read_text())
    assert isinstance(document["systems"]["merged"]["normalised"], float)
    assert document["version"] == 1


def test_the_scoreboard_holds_means_and_worst_tasks(tmp_path: Path) -> None:
    found = board(tmp_path)
    assert found == scoreboard(tmp_path / "scores")
    assert found.systems == ("base", "expert", "average", "merged")
    shares = found.normalised("merged")
    assert found.mean("merged") == pytest.approx((shares["a"] + shares["b"]) / 2)
    assert found.worst("merged") == min(((task, share) for task, share in shares.items()), key=lambda pair: pair[1])
    document = found.summary().data()
    assert document["systems"]["merged"]["mean_normalised"] == found.mean("merged")
    assert json.loads(json.dumps(document)) == document
    assert list(scoreboard(tmp_path, ["b"]).tasks) == ["b"]


def test_the_scoreboard_refuses_what_does_not_fit_together(tmp_path: Path) -> None:
    board(tmp_path)
    path = tmp_path / "scores" / "a.json"
    intact = path.read_text()
    with pytest.raises(InputError, match="no system named 'champion'"):
        scoreboard(tmp_path).mean("champion")
    with pytest.raises(InputError, match="no readable scores file"):
        scoreboard(tmp_path, ["nowhere"])
    with pytest.raises(InputError, match="no scores here"):
        scoreboard(tmp_path / "elsewhere")

    document = json.loads(intact)
    del document["systems"]["average"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="no scores of average, which other tasks have"):
        scoreboard(tmp_path)
    path.write_text(json.dumps(json.loads(intact) | {"metric": "macro_f1"}))
    with pytest.raises(InputError, match="different metrics: accuracy, macro_f1"):
        scoreboard(tmp_path)
    path.write_text(json.dumps(json.loads(intact) | {"version": 2}))
    with pytest.raises(InputError, match="version is 2, known is 1"):
        scoreboard(tmp_path)
    for spoilt in ("{", "[]", "{}", '{"version": 1, "systems": {"x": {}}}'):
        path.write_text(spoilt)
        with pytest.raises(InputError, match="not a scores file"):
            scoreboard(tmp_path)


def test_reading_a_scoreboard_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, modelweld.evaluation; print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
