"""Loss terms, regularisers and adapters: each turns what a step has computed into numbers, and knows no method."""

from vlprompt.objectives import (
    aggregation,
    gradient_dropout,
    grouped_text,
    knowledge,
    projection,
    self_regularisation,
    shift,
)
from vlprompt.objectives.base import (
    Objective,
    Step,
    create_objective,
    get_objective_class,
    list_objectives,
    register_objective,
)
from vlprompt.objectives.mixture import routing_loss, routing_target, text_to_text_loss
from vlprompt.objectives.shift import feature_shift

__all__ = [
    "Objective",
    "Step",
    "aggregation",
    "create_objective",
    "feature_shift",
    "get_objective_class",
    "gradient_dropout",
    "grouped_text",
    "knowledge",
    "list_objectives",
    "projection",
    "register_objective",
    "routing_loss",
    "routing_target",
    "self_regularisation",
    "shift",
    "text_to_text_loss",
]
