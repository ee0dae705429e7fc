"""Zero-shot CLIP: one hand-written template, or the normalised ensemble of several (CoOp: trainers/zsclip.py).

Each template's text feature is normalised, the features are averaged, and the mean is normalised again. Nothing is
learned.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.config.types import OpenTemplates, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts.zero_shot import template_features

SELECTED_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates of CoOp's ensemble; it appends the template of the data set, except on ImageNet."""


@validated("settings")
class ZeroShotSettings:
    """Settings of zero-shot CLIP.

    Attributes:
        templates: The hand-written templates; each holds ``{}`` once.
        ensemble: Add the seven selected templates in front.
    """

    templates: OpenTemplates = ()
    ensemble: bool = False


@register("zeroshot")
class ZeroShot(PromptMethod):
    """Frozen CLIP with hand-written prompts."""

    Settings = ZeroShotSettings
    settings: ZeroShotSettings

    def build(self) -> None:
        """Encode the templates once; there are no trainable parameters."""
        selected = SELECTED_TEMPLATES if self.settings.ensemble else ()
        weights = template_features(self.backbone, self.class_names, [*selected, *self.settings.templates])
        self.register_buffer("weights", weights, persistent=False)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the ensembled unit text features ``[C, D]``."""
        return self.unit_text(self.get_buffer("weights"))
