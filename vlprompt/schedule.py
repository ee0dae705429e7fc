"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math


def warm_cosine(at: int, length: int, lr: float, warmup: int, warmup_lr: float, final: float = 0.0) -> float:
    """Return the rate at epoch or step ``at`` (from 0) of ``length``, ``lr`` being the full one.

    Constant during the ``warmup`` first, then a cosine to ``final`` that starts from its own zero and has the whole
    ``length`` as half period, so that it never gets there (Dassl: dassl/optim/lr_scheduler.py).
    """
    if at < warmup:
        return warmup_lr
    return final + (lr - final) / 2 * (1 + math.cos(math.pi * (at - warmup) / max(length, 1)))
