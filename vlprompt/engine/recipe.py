"""The learning-rate schedule of the CoOp family (Dassl: dassl/optim/lr_scheduler.py; prompt_learners 2.5)."""

from __future__ import annotations

import math

from vlprompt.engine.config import RecipeConfig


def learning_rate(epoch: int, lr: float, recipe: RecipeConfig) -> float:
    """Return the rate of ``epoch`` (from 0) for a parameter group whose full rate is ``lr``.

    Constant ``warmup_lr`` during the warm-up epochs, then a cosine that starts from its own zero and has the whole
    number of epochs as half period, so that it never reaches zero.
    """
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr
    return lr / 2 * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / recipe.epochs))
