"""Gradient dropout: entries that disagree with the frozen model are left out at random (R-AMT; arXiv 2307.15049)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.types import Above0, Fraction, OpenTemplates, validated
from vlprompt.objectives.base import Host, register_objective
from vlprompt.objectives.two_gradients import TwoGradients
from vlprompt.prompts import Draws


@validated("objectives.gradient_dropout")
class GradientDropoutSettings:
    """Settings of the dropout.

    Attributes:
        strength: What is taken of an entry that is dropped: 1 all of it, 0 nothing (the paper's lambda).
        temperature: Divides both logits of the general loss.
        templates: The frozen model's prompts; their features are averaged. Left open, the data set's own.
    """

    strength: Fraction = 1.0
    temperature: Above0 = 1.0
    templates: OpenTemplates = ()


@register_objective("gradient_dropout")
class GradientDropout(TwoGradients):
    """Leaves out entries of the task's gradient, the likelier the more the frozen model pulls the other way.

    Unlike :class:`~vlprompt.objectives.projection.ProjectedGradient` it decides entry by entry, and by lot. Every
    process of several draws alike, and so does a resumed run (:class:`~vlprompt.prompts.Draws`).
    """

    Settings = GradientDropoutSettings
    settings: GradientDropoutSettings

    def build(self, host: Host) -> None:
        """Encode the templates once, and get ready to draw."""
        super().build(host)
        self.draws = Draws()

    def combine(self, task: list[Tensor], general: list[Tensor]) -> list[Tensor]:
        """Return the gradients of the task that are left."""
        if not self.settings.strength:
            return task
        with self.draws.step(self.target.device):
            return [drop(a, b, torch.rand_like(a), self.settings.strength) for a, b in zip(task, general, strict=True)]


def keep_probability(task: Tensor, general: Tensor) -> Tensor:
    """Return how likely each entry of ``task`` is kept: 1 where both agree, |a| / (|a| + |b|) where they do not.

    The official code's small constant draws it towards one half where both are near 0 (masktuning.py 338-387).
    """
    purity = task.sign() * (task + general) / (task.abs() + general.abs() + 1e-8)
    return (purity + 1) / 2


def drop(task: Tensor, general: Tensor, uniform: Tensor, strength: float) -> Tensor:
    """Return ``task`` with the entries scaled by 1 - ``strength`` that a draw ``uniform`` in [0, 1) does not keep."""
    keep = keep_probability(task, general) > uniform
    return torch.where(keep, task, task * (1 - strength))
