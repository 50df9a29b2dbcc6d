"""Progress in a log: few lines, each with the time that is left."""

from __future__ import annotations

from modelweld.evaluation.progress import LINE_EVERY_S, progress_lines


def test_a_log_gets_a_line_now_and_then_with_the_time_left() -> None:
    now = 0.0
    lines: list[str] = []
    advance = progress_lines("evaluate mails", 100, lines.append, clock=lambda: now)
    for step in range(1, 11):
        now = step * LINE_EVERY_S / 2
        advance(10)
    assert lines == [
        "evaluate mails: 20 of 100 rows, about 2 min left",
        "evaluate mails: 40 of 100 rows, about 2 min left",
        "evaluate mails: 60 of 100 rows, about 1 min left",
        "evaluate mails: 80 of 100 rows, about 0 min left",
    ]


def test_a_short_evaluation_says_nothing() -> None:
    lines: list[str] = []
    advance = progress_lines("evaluate mails", 10, lines.append, clock=lambda: 0.0)
    advance(10)
    assert lines == []
