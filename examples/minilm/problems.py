"""What can go wrong here and a person can do something about.

* Problem
  + PackageProblem   a package could not be fetched, or does not hold what the example reads
  + TextProblem      a task's texts are not what the example expects
  + WeakExpert       finetuning did not beat the probe on the frozen base
  + WorkerLost       a process that finetunes ended without an error
"""

from __future__ import annotations


class Problem(Exception):
    """The base of all of them; its text says what to do."""


class PackageProblem(Problem):
    """A package could not be fetched, or does not hold what the example reads."""


class TextProblem(Problem):
    """A task's texts are not what the example expects."""


class WeakExpert(Problem):
    """Finetuning did not beat the probe on the frozen base."""


class WorkerLost(Problem):
    """A process that finetunes ended without an error, as one does that the system kills for its memory."""
