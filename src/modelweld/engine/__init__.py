"""The streaming engine: a recipe becomes a plan, a plan becomes a directory, at the speed of the disk.

`inputs` opens the models and lays them beside each other, `roles` and `rules` say what each tensor is and gets, `plan`
puts that together, `compute` makes one tensor, `threads` make many, `processes` and `cluster` spread them over devices
and hosts, `execute` leads, `journal` and `staging` make an interrupted merge go on and a finished one appear at once.

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
    "open_inputs",
    "place",
    "publish",
    "require_replaceable",
    "staged",
]
