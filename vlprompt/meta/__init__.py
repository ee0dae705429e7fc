"""Meta-learning across tasks: GRAM's prompt initialisation and gradient regulator, a reconstruction."""

from vlprompt.meta.bilevel import adapted, differentiable, inner_rates, task_loss
from vlprompt.meta.regulators import Regulator, RegulatorSettings

__all__ = ["Regulator", "RegulatorSettings", "adapted", "differentiable", "inner_rates", "task_loss"]
