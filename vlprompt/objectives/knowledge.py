"""Knowledge guidance: learned text features stay near those of a template (KgCoOp; Yao et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import NonNegative, OpenTemplates, validated
from vlprompt.objectives.base import Host, Objective, Part, Step, Terms, register_objective
from vlprompt.prompts.zero_shot import template_features


@validated("objectives.knowledge")
class KnowledgeSettings:
    """Settings of the knowledge term.

    Attributes:
        weight: Factor of the term; 8 in the official scripts.
        variant: ``code``: one minus the mean cosine, as in the published results. ``paper``: the mean squared distance,
            twice as large for unit vectors.
        templates: The hand-written prompts; their unit features are averaged. Default: the template of the data set.
    """

    weight: NonNegative = 8.0
    templates: OpenTemplates = ()
    variant: Literal["code", "paper"] = "code"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.weight else switched_off("weight is 0", "templates", "variant")


@register_objective("knowledge")
class Knowledge(Objective):
    """Adds ``weight * (1 - mean cosine)`` of learned and frozen text features (htyao89/KgCoOp: kgcoop.py 309)."""

    Settings = KnowledgeSettings
    settings: KnowledgeSettings
    target: Tensor

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Require text features that depend on parameters."""
        return {"text": ""}

    def build(self, host: Host) -> None:
        """Encode the template once."""
        target = template_features(host.backbone, host.class_names, self.settings.templates)
        self.register_buffer("target", target, persistent=False)

    def add(self, step: Step, terms: Terms) -> Terms:
        """Add the term ``knowledge``, averaged over classes and over experts or images."""
        cosines = F.cosine_similarity(step.text_features, self.target, dim=-1, eps=1e-7)
        distance = 1 - cosines.mean()
        if self.settings.variant == "paper":
            distance = 2 * distance  # of unit vectors: |a - b|^2 = 2 (1 - cos)
        return {**terms, "knowledge": self.settings.weight * distance}
