"""Loss terms, regularisers and adapters, one module each; importing the package imports and registers all of them.

Objectives are independent of methods: they use the interface :class:`vlprompt.objectives.base.Host`.
"""

import importlib
import pkgutil

from vlprompt.objectives.base import (
    Objective,
    Step,
    create_objective,
    get_objective_class,
    list_objectives,
    register_objective,
)

# Importing the package imports every module in it, which registers the objectives.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Objective",
    "Step",
    "create_objective",
    "get_objective_class",
    "list_objectives",
    "register_objective",
]
