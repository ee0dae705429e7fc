"""ProGrad: a step never goes against what the frozen model knows (Zhu et al., ICCV 2023; equation 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.objectives.base import non_negative, register_objective
from vlprompt.objectives.two_gradients import TwoGradients, check_temperature


@dataclass(frozen=True)
class ProjectedGradientSettings:
    """Settings of the projection.

    Attributes:
        strength: How much of the conflicting part is taken away: 1 all of it (0.8 in the README's runs at 8 and 16
            shots of Flowers102, DTD and EuroSAT).
        temperature: Divides both logits; the general loss is multiplied by its square.
        template: The frozen model's prompt with {} for the class name.
    """

    strength: float = 1.0
    temperature: float = 1.0
    template: str = "a photo of a {}."

    def __post_init__(self) -> None:
        non_negative(self, "strength", where="projected_gradient")
        check_temperature(self, "projected_gradient")


@register_objective("projected_gradient")
class ProjectedGradient(TwoGradients):
    """Takes from the task's gradient what conflicts with the gradient of agreeing with the frozen model.

    Per tensor: where task gradient g and general gradient k have a negative product, g loses ``strength`` times its
    part along k (BeierZhu/Prompt-align: dassl/engine/trainer.py 311-349).
    """

    Settings = ProjectedGradientSettings
    settings: ProjectedGradientSettings

    def templates(self) -> list[str]:
        """Return the one template."""
        return [self.settings.template]

    def combine(self, task: list[Tensor], general: list[Tensor]) -> list[Tensor]:
        """Return the projected gradients."""
        return [project(g, k, self.settings.strength) for g, k in zip(task, general, strict=True)]


def project(task: Tensor, general: Tensor, strength: float) -> Tensor:
    """Return ``task`` without ``strength`` times its part along ``general``, if their product is negative."""
    length = general.norm()
    product = (task * general).sum()
    conflicts = (product < 0) & (length > 0)
    along = product / length.clamp(min=torch.finfo(length.dtype).tiny) ** 2 * general
    return torch.where(conflicts, task - strength * along.nan_to_num(), task)
