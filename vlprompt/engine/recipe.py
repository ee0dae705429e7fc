"""Optimisers and learning-rate schedules of a recipe (Dassl: dassl/optim/lr_scheduler.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlprompt.config.run import RecipeConfig, epochs_and_steps
from vlprompt.schedule import rising_cosine, warm_cosine

SECOND_BETA = 0.999


def learning_rate(at: int, lr: float, recipe: RecipeConfig, per_epoch: int = 1) -> float:
    """Return the learning rate at epoch or step ``at`` (from 0) of a parameter group.

    Args:
        at: The epoch, or the optimiser's step for a schedule by step.
        lr: The group's base rate. A group of rate 0 keeps it.
        recipe: The recipe of the training.
        per_epoch: Optimiser steps per epoch. A schedule by epoch over ``recipe.epochs`` does not depend on it.
    """
    if not lr:
        return 0.0
    final = min(recipe.final_lr, lr)
    epochs, steps = epochs_and_steps(recipe, per_epoch)
    length, unit = (steps, per_epoch) if recipe.schedule == "step" else (epochs, 1)
    if recipe.warmup_steps is not None:
        return rising_cosine(at, length, lr, recipe.warmup_steps, final)
    assert recipe.warmup_epochs is not None
    warmup, linear = recipe.warmup_epochs * unit, recipe.warmup == "linear"
    return warm_cosine(at, length, lr, warmup, recipe.warmup_lr, final, linear=linear)


def make_optimizer(groups: Sequence[dict[str, Any]], recipe: RecipeConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimiser for parameter groups ``{"params": ..., "lr": ...}``."""
    lr, decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, weight_decay=decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=(recipe.momentum, SECOND_BETA), weight_decay=decay)
