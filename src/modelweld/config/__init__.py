"""What a user may say: params.yaml and recipe files as frozen models that refuse what they do not know.

`strict` is the base of every section, `methods` holds each method's parameters, `align` the alignment's, `recipe` the
recipe around them and `params` the whole of params.yaml. `loading` gives them from files: `reading` takes YAML, `paths`
says where relative paths start, `explaining` puts what pydantic found into the user's own keys. `mergekit` imports.

    params = load_params(Path("params.yaml"))
    recipe = params.recipe()
"""

from modelweld.config.loading import json_schema, load_params, load_recipe, load_recipe_or_params
from modelweld.config.params import Evaluate, Params, Register, SourceEntry, Task, Validate
from modelweld.config.recipe import ExpertEntry, Output, Recipe, Rule, Selector

__all__ = [
    "Evaluate",
    "ExpertEntry",
    "Output",
    "Params",
    "Recipe",
    "Register",
    "Rule",
    "Selector",
    "SourceEntry",
    "Task",
    "Validate",
    "json_schema",
    "load_params",
    "load_recipe",
    "load_recipe_or_params",
]
