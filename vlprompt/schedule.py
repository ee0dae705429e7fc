"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math


def warm_cosine(at: int, length: int, lr: float, warmup: int, warmup_lr: float, final: float = 0.0) -> float:
    """Return the learning rate at epoch or step ``at`` (from 0) of ``length``.

    The rate is ``warmup_lr`` for the first ``warmup`` steps. A cosine from ``lr`` towards ``final`` follows. Its half
    period is the whole ``length``, so it does not reach ``final`` (Dassl: dassl/optim/lr_scheduler.py).
    """
    if at < warmup:
        return warmup_lr
    return final + (lr - final) / 2 * (1 + math.cos(math.pi * (at - warmup) / max(length, 1)))
