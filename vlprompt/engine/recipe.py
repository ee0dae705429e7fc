"""The learning-rate schedule of the CoOp family (Dassl: dassl/optim/lr_scheduler.py; prompt_learners 2.5)."""

from __future__ import annotations

from vlprompt.caches.training import warm_cosine
from vlprompt.engine.config import RecipeConfig


def learning_rate(epoch: int, lr: float, recipe: RecipeConfig) -> float:
    """Return the rate of ``epoch`` (from 0) for a parameter group whose full rate is ``lr``."""
    return warm_cosine(epoch, recipe.epochs, lr, recipe.warmup_epochs, recipe.warmup_lr)
