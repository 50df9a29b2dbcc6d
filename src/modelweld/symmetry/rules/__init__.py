"""What each ATen operation does to axes: one short function per operation, registered by name in `RULES`.

A rule gets a `Call` and returns the axes of the result (a tuple of them for operations with several results). It says
which axes the operation makes one (`unify`), which it keeps, and which it pins (`freeze`). An operation without a rule
pins everything it touches: less alignment, never a wrong one.

`call` holds the table, and what a rule is given. The rules are in `elementwise` (activations, arithmetic, reductions),
`linear` (products that contract axes, and norms), `shape` (views, copies, joins), `pieces` (packed projections) and
`index` (tables, and choices of experts). Adding one is a function with `@rule("name")` in one of these files.
"""

from modelweld.symmetry.rules import elementwise, index, linear, pieces, shape
from modelweld.symmetry.rules.call import RULES, Call, Choice, Result, name_of, unknown
from modelweld.symmetry.rules.elementwise import UNIFORM
from modelweld.symmetry.rules.index import CARRIES, CHOOSES

__all__ = [
    "CARRIES",
    "CHOOSES",
    "RULES",
    "UNIFORM",
    "Call",
    "Choice",
    "Result",
    "elementwise",
    "index",
    "linear",
    "name_of",
    "pieces",
    "shape",
    "unknown",
]
