"""Gradient projection against conflicts with the frozen model (ProGrad; Zhu et al., ICCV 2023; equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Above0, NonNegative, OpenTemplates, validated
from vlprompt.objectives.base import register_objective
from vlprompt.objectives.two_gradients import TwoGradients


@validated("objectives.projected_gradient")
class ProjectedGradientSettings:
    """Settings of the projection.

    Attributes:
        strength: Fraction of the conflicting component that is removed, 1 for all (0.8 in the README's runs at 8 and 16
            shots of Flowers102, DTD and EuroSAT).
        temperature: Divides both logits; the general loss is multiplied by its square.
        templates: The frozen model's prompts; their features are averaged. Default: the template of the data set.
    """

    strength: NonNegative = 1.0
    temperature: Above0 = 1.0
    templates: OpenTemplates = ()

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.strength else switched_off("strength is 0", "temperature", "templates")


@register_objective("projected_gradient")
class ProjectedGradient(TwoGradients):
    """Takes from the task's gradient what conflicts with the gradient of agreeing with the frozen model.

    Per tensor: if the product of the task gradient g and the general gradient k is negative, ``strength`` times the
    component of g along k is subtracted (BeierZhu/Prompt-align: dassl/engine/trainer.py 311-349).
    """

    Settings = ProjectedGradientSettings
    settings: ProjectedGradientSettings

    def combine(self, task: list[Tensor], general: list[Tensor]) -> list[Tensor]:
        """Return the projected gradients."""
        return [project(g, k, self.settings.strength) for g, k in zip(task, general, strict=True)]


def project(task: Tensor, general: Tensor, strength: float) -> Tensor:
    """Return ``task`` minus ``strength`` times its component along ``general``, if their product is negative."""
    length = general.norm()
    product = (task * general).sum()
    conflicts = (product < 0) & (length > 0)
    along = product / length.clamp(min=torch.finfo(length.dtype).tiny) ** 2 * general
    return torch.where(conflicts, task - strength * along.nan_to_num(), task)
