"""The streaming engine: a recipe becomes a plan, a plan becomes a directory, at the speed of the disk.

- `plan`: what will happen to each tensor, decided from headers; `cost`: what that takes on this machine
- `run`: how one tensor is made, in chunks or whole, on a CPU or an accelerator
- `executors`: threads, one process per device, or Ray tasks, which make all of them; `execute` chooses and leads
- `output`: the directory being filled, the journal that an interrupted merge resumes from, and its publication

    with open_inputs(recipe) as inputs:
        plan = build(recipe, inputs)
        with staged(out, plan.key) as directory:
            execute(plan, inputs, directory, placement=place("auto"))
            publish(directory, out)
"""

from modelweld.engine.execute import Execution, execute, execute_together
from modelweld.engine.executors.placement import DevicePlacement, place
from modelweld.engine.output.staging import publish, require_replaceable, staged
from modelweld.engine.plan.inputs import Inputs, open_inputs
from modelweld.engine.plan.planner import build
from modelweld.engine.plan.records import Plan, TensorPlan
from modelweld.engine.progress import Progress
from modelweld.engine.run.in_memory import merge_in_memory

__all__ = [
    "DevicePlacement",
    "Execution",
    "Inputs",
    "Plan",
    "Progress",
    "TensorPlan",
    "build",
    "execute",
    "execute_together",
    "merge_in_memory",
    "open_inputs",
    "place",
    "publish",
    "require_replaceable",
    "staged",
]
