"""How good each system is at each task, how sure that is, and the files that say so.

`job` runs one evaluation: `dataset_spec` says which rows, `kinds` what their kind of task does with them, `systems`
which models, and `settings` how predictions are made here. `dataset` and `images` read rows, `labels` maps their labels
into the head's classes; `texts` (in batches that `batching` lays out by length) and `images` predict; `cache` keeps
predictions by content; `metrics` and `significance` turn them into scores; `predictions` writes one of a task's two
files, modelweld.formats.scores the other. `joint_label_space` scores all heads of a merge together. `scores` reads a
project's scoreboard. Only this is imported here: it needs no torch.

    board = scoreboard(Path())          # every scores/<task>.json
    board.mean("merged"), board.worst("merged")
"""

from modelweld.evaluation.scores import scoreboard
from modelweld.formats.scores import Interval, PairedTest, Scoreboard, SystemScores, TaskScores

__all__ = ["Interval", "PairedTest", "Scoreboard", "SystemScores", "TaskScores", "scoreboard"]
