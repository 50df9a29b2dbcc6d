"""What the gate lets through, what it refuses, and that it says why."""

from __future__ import annotations

import math

import pytest

from modelweld.config import Register
from modelweld.formats.scores import RegisteredScores, TaskScores
from modelweld.registry.gate import decide, mean_normalised
from tests.support.scores import system_scores, task_scores

THRESHOLDS = Register(min_relative=0.7, champion_margin=0.01)


def board(digest: str = "d", **relative: float | None) -> dict[str, TaskScores]:
    found = {}
    for task, value in relative.items():
        systems = {"base": system_scores(0.1, 0.2)} | ({} if value is None else {"merged": system_scores(0.5, value)})
        found[task] = task_scores(task, systems, dataset_digest=digest)
    return found


def test_every_task_must_reach_its_share_of_the_expert() -> None:
    assert decide(board(news=0.7, spam=1.2), None, THRESHOLDS).passed
    decision = decide(board(news=0.69, spam=1.2), None, THRESHOLDS)
    assert not decision.passed
    assert decision.explain() == "news: 0.6900 of its expert < 0.7"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_score_that_is_none_refuses(value: float | None) -> None:
    decision = decide(board(news=value), None, THRESHOLDS)
    assert not decision.passed
    assert "no finite score" in decision.explain()


def test_nothing_evaluated_refuses() -> None:
    assert not decide({}, None, THRESHOLDS).passed


@pytest.mark.parametrize(("mean", "passed"), [(0.90, True), (0.895, True), (0.88, False)])
def test_the_mean_may_fall_short_of_the_champion_by_the_margin(mean: float, passed: bool) -> None:
    decision = decide(board(news=mean, spam=mean), board(news=0.8, spam=1.0), THRESHOLDS)
    assert decision.passed is passed
    assert "mean over 2 common tasks" in decision.reasons[-1].text


def test_only_common_tasks_are_compared_with_the_champion() -> None:
    decision = decide(board(news=0.9, spam=0.75), board(news=0.9, weather=1.5), THRESHOLDS)
    assert decision.passed
    texts = [reason.text for reason in decision.reasons]
    assert "weather: the champion has this task, this merge does not" in texts
    assert any("mean over 1 common tasks" in text for text in texts)


def test_a_champion_with_other_tasks_or_other_rows_is_said() -> None:
    apart = decide(board(news=0.9), board(weather=0.9), THRESHOLDS)
    assert apart.passed
    assert "not compared" in apart.explain()
    assert "other rows" in decide(board(news=0.9), board("e", news=0.9), THRESHOLDS).explain()


def test_what_a_version_remembers_of_its_scores_decides_alike() -> None:
    champion, mine = board(news=0.8, spam=1.0), board(news=0.9, spam=0.85)
    whole = decide(mine, champion, THRESHOLDS)
    kept = [{task: RegisteredScores.of(one) for task, one in scores.items()} for scores in (mine, champion)]
    assert decide(*kept, THRESHOLDS) == whole
    assert mean_normalised(kept[0]) == pytest.approx(0.875)
    assert set(kept[0]["news"].systems) == {"merged"}
