"""Zero-shot CLIP: one hand-written template, or the normalised ensemble of several (CoOp: trainers/zsclip.py).

Each template's text feature is normalised, the features are averaged, and the mean is normalised again. Nothing is
learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from vlprompt.config.types import OpenTemplates, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts.zero_shot import Average, template_features


@validated("settings")
class ZeroShotSettings:
    """Settings of zero-shot CLIP.

    Attributes:
        templates: The hand-written templates and sentences.
        ensemble: Add seven selected templates in front. Without ``templates``, the ensemble ``coop`` of the data set:
            the seven templates and its own one, on ImageNet the seven alone.
        average: ``unit`` averages unit features, ``raw`` raw ones; the mean is normalised. ``scores`` averages the
            cosines of all texts of a class (DCLIP: sachit-menon/classify_by_description_release, main.py 51-66); the
            classifier's rows are then shorter than 1.
    """

    templates: OpenTemplates = ()
    ensemble: bool = False
    average: Average = "unit"

    def with_derived_texts(self) -> ZeroShotSettings:
        """Return the settings with the ensemble among the templates."""
        if not self.ensemble:
            return self
        entries = ("ensemble:selected", *self.templates) if self.templates else ("ensemble:coop",)
        return dataclasses.replace(self, templates=entries, ensemble=False)


@register("zeroshot")
class ZeroShot(PromptMethod):
    """Frozen CLIP with hand-written prompts."""

    per_target = True
    by_recipe = False
    Settings = ZeroShotSettings
    settings: ZeroShotSettings

    def build(self) -> None:
        """Encode the templates once; there are no trainable parameters."""
        settings = self.settings
        weights = template_features(self.backbone, self.class_names, settings.templates, settings.average)
        self.register_buffer("weights", weights, persistent=False)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own settings."""
        return {"templates": self.settings.templates, "average": self.settings.average}

    @property
    def in_towers(self) -> bool:
        """Return True: nothing is learned."""
        return True

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the ensembled text features ``[C, D]``, unit rows except for averaged scores."""
        weights = self.get_buffer("weights")
        lengths = weights.norm(dim=-1, keepdim=True) if self.settings.average == "scores" else 1.0
        return lengths * self.unit_text(weights)
