"""What a merge will do, decided before a weight is read.

`inputs` opens the models and matches their tensors, `roles` and `rules` say what each tensor is and its method,
`adapters` which weights stay in LoRA factors, and `planner` puts that together into the `records` of a plan.
"""

from modelweld.engine.plan.planner import build
from modelweld.engine.plan.records import HeadPlan, Packing, Plan, Role, Route, TensorPlan, dtype_name

__all__ = ["HeadPlan", "Packing", "Plan", "Role", "Route", "TensorPlan", "build", "dtype_name"]
