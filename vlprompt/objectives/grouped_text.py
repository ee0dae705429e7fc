"""Grouped text supervision: learned prompts are classified against hand-written prompts (MoCoOp, after LASP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.texts import has_references
from vlprompt.config.types import NonNegative, Positive, Templates, validated
from vlprompt.errors import ConfigError
from vlprompt.objectives.base import Host, Objective, Part, Step, Terms, register_objective
from vlprompt.prompts.zero_shot import group_features


@validated("objectives.grouped_text")
class GroupedTextSettings:
    """Settings of the term.

    Attributes:
        weight: Factor of the term; 5 in MoCoOp.
        templates: Hand-written templates, in the order of the groups; a file of sentences counts as one template.
        groups: Sizes of the groups; they add up to the number of templates.
        temperature: Factor on the cosines: 1 in MoCoOp's official code, 100 in LASP.
    """

    weight: NonNegative = 5.0
    templates: Templates = ("a photo of a {}.", "a low resolution photo of a {}.", "a good photo of a {}.")
    groups: tuple[Positive, ...] = (1, 1, 1)
    temperature: NonNegative = 1.0

    def __post_init__(self) -> None:
        if sum(self.groups) != len(self.templates) and not has_references(self.templates):
            raise ConfigError(
                f"objectives.grouped_text.groups is {list(self.groups)}, which adds up to {sum(self.groups)}; "
                f"objectives.grouped_text.templates holds {len(self.templates)}"
            )

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.weight else switched_off("weight is 0", "templates", "groups", "temperature")


@register_objective("grouped_text")
class GroupedText(Objective):
    """Adds ``weight`` times the cross-entropy of learned class features against each group's prototypes.

    If the method has as many experts as groups, each expert has its group, as in MoCoOp; otherwise all groups are used.
    """

    Settings = GroupedTextSettings
    settings: GroupedTextSettings
    prototypes: Tensor

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Require text features that depend on parameters."""
        return {"text": ""}

    def build(self, host: Host) -> None:
        """Encode the templates once: unit prototypes ``[G, C, D]``."""
        settings = self.settings
        prototypes = group_features(host.backbone, host.class_names, settings.templates, settings.groups)
        self.register_buffer("prototypes", prototypes, persistent=False)

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the term ``grouped_text``."""
        text_features, prototypes = step.text_features, self.prototypes
        sets = text_features if text_features.ndim == 3 else text_features.unsqueeze(0)
        if self.host.text_features_per == "expert" and len(sets) == len(prototypes):
            loss = text_to_text_loss(sets, prototypes, self.settings.temperature)
        else:
            losses = [
                text_to_text_loss(sets, prototype.expand_as(sets), self.settings.temperature)
                for prototype in prototypes
            ]
            loss = torch.stack(losses).mean()
        return {**terms, "grouped_text": self.settings.weight * loss}


def text_to_text_loss(expert_text_features: Tensor, prototypes: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy of each expert's class features against its group's prototypes.

    MoCoOp's grouped text supervision (official losses.py 87-108), after LASP's text-to-text loss.

    Args:
        expert_text_features: ``[G, C, D]`` features of the learned prompts, unit length.
        prototypes: ``[G, C, D]`` features of the hand-written templates, unit length; c's is the target of row c.
        temperature: Factor on the cosines: 1 in MoCoOp's official code, exp(logit scale) in LASP.
    """
    cosines = temperature * expert_text_features @ prototypes.transpose(1, 2)  # [G, C, C]
    target = torch.arange(cosines.shape[1], device=cosines.device).expand(len(cosines), -1)
    return F.cross_entropy(cosines.flatten(0, 1), target.flatten())
