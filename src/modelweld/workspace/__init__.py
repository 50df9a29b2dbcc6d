"""git and DVC behind one thin adapter: a run's worktree, its stages as child processes, its record, its bytes later.

`repository` finds the project, its records and what is unfinished; `worktree` is where one run works; `records` writes
and reads the tag a run leaves; `processes` runs a command so that it dies with its parent; `materialising` restores one
output of a record. `initialise` makes a first project and `doctor` says what is wrong with one.

    project = Project.find(Path())
    with project.worktree() as tree:
        tree.repro("merge")
        record = tree.record()
    project.push(record)
"""

from modelweld.workspace.materialising import materialise
from modelweld.workspace.records import Record
from modelweld.workspace.repository import Project, RunState
from modelweld.workspace.worktree import Worktree

__all__ = ["Project", "Record", "RunState", "Worktree", "materialise"]
