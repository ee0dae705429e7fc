"""Gradient dropout: entries that disagree with the frozen model are dropped at random (R-AMT; arXiv 2307.15049)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Above0, Fraction, OpenTemplates, validated
from vlprompt.objectives.base import Host, register_objective
from vlprompt.objectives.two_gradients import TwoGradients
from vlprompt.prompts import Draws


@validated("objectives.gradient_dropout")
class GradientDropoutSettings:
    """Settings of the dropout.

    Attributes:
        strength: Fraction removed from a dropped entry, from 0 (nothing) to 1 (all): the paper's lambda.
        temperature: Divides both logits of the general loss.
        templates: The frozen model's prompts; their features are averaged. Default: the template of the data set.
    """

    strength: Fraction = 1.0
    temperature: Above0 = 1.0
    templates: OpenTemplates = ()

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.strength else switched_off("strength is 0", "temperature", "templates")


@register_objective("gradient_dropout")
class GradientDropout(TwoGradients):
    """Leaves out entries of the task's gradient, the likelier the more the frozen model pulls the other way.

    Unlike :class:`~vlprompt.objectives.projection.ProjectedGradient` it decides for every entry, at random. Draws are
    identical in all processes and in a resumed run (:class:`~vlprompt.prompts.Draws`).
    """

    Settings = GradientDropoutSettings
    settings: GradientDropoutSettings

    def build(self, host: Host) -> None:
        """Encode the templates once, and create the random draws."""
        super().build(host)
        self.draws = Draws()

    def combine(self, task: list[Tensor], general: list[Tensor]) -> list[Tensor]:
        """Return the task gradients after dropout."""
        if not self.settings.strength:
            return task
        with self.draws.step(self.target.device):
            return [drop(a, b, torch.rand_like(a), self.settings.strength) for a, b in zip(task, general, strict=True)]


def keep_probability(task: Tensor, general: Tensor) -> Tensor:
    """Return the probability to keep each entry of ``task``: 1 where signs agree, else |a| / (|a| + |b|).

    With the official code's small constant it approaches 1/2 where both are near 0 (masktuning.py 338-387).
    """
    purity = task.sign() * (task + general) / (task.abs() + general.abs() + 1e-8)
    return (purity + 1) / 2


def drop(task: Tensor, general: Tensor, uniform: Tensor, strength: float) -> Tensor:
    """Return ``task`` with dropped entries scaled by 1 - ``strength``; ``uniform`` are draws in [0, 1)."""
    keep = keep_probability(task, general) > uniform
    return torch.where(keep, task, task * (1 - strength))
