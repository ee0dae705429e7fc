"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math


def warm_cosine(
    at: int, length: int, lr: float, warmup: int, warmup_lr: float, final: float = 0.0, *, linear: bool = False
) -> float:
    """Return the learning rate at epoch or step ``at`` (from 0) of ``length``.

    The rate is ``warmup_lr`` for the first ``warmup`` steps; with ``linear`` only at the first of them, and
    ``lr * at / warmup`` at the others. A cosine from ``lr`` towards ``final`` follows. Its half period is the whole
    ``length``, so it does not reach ``final`` (Dassl: dassl/optim/lr_scheduler.py).
    """
    if at < warmup:
        return lr * at / warmup if linear and at else warmup_lr
    return _cosine(at - warmup, length, lr, final)


def rising_cosine(at: int, length: int, lr: float, warmup: int, final: float = 0.0) -> float:
    """Return the learning rate at step ``at`` (from 0) of ``length``.

    The rate rises on a line, ``lr * (at + 1) / warmup``, for the first ``warmup`` steps. A cosine from ``lr`` towards
    ``final`` runs over the rest of the steps (VP: hjbahng/visual_prompting, utils.py).
    """
    if at < warmup:
        return lr * (at + 1) / warmup
    return _cosine(at - warmup, length - warmup, lr, final)


def _cosine(at: int, length: int, lr: float, final: float) -> float:
    return final + (lr - final) / 2 * (1 + math.cos(math.pi * at / max(length, 1)))
