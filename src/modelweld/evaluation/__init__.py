"""How good each system is at each task, how sure that is, and the files that say so.

`job` runs one evaluation: `dataset_spec` says which rows, `kinds` what their kind of task does with them, `systems`
which models, and `settings` how predictions are made here. `dataset` and `images` read rows, `labels` maps their labels
into the head's classes; `texts` (in batches that `batching` lays out by length) and `images` predict; `cache` keeps
predictions by content; `metrics` and `significance` turn them into scores; `scores` and `predictions` are the two files
of a task. `joint_label_space` scores all heads of a merge together. Only `scores` is imported here: reading a
scoreboard needs no torch.

    board = scoreboard(Path())          # every scores/<task>.json
    board.mean("merged"), board.worst("merged")
"""

from modelweld.evaluation.scores import (
    Interval,
    PairedTest,
    Scoreboard,
    SystemScores,
    TaskScores,
    read_scores,
    scoreboard,
    write_scores,
)

__all__ = [
    "Interval",
    "PairedTest",
    "Scoreboard",
    "SystemScores",
    "TaskScores",
    "read_scores",
    "scoreboard",
    "write_scores",
]
