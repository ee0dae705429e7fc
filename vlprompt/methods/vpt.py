"""VPT inside CLIP: learned image tokens, fixed text (Jia et al., ECCV 2022; as in MaPLe's trainers/vpt.py).

V tokens are placed after the patches at the input; with depth J each of the first J layers has separate tokens. The
text is "a photo of a NAME." for every data set in the official code; another template can be set.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Ge, Le, Positive, Template, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import VisualPrompts
from vlprompt.prompts.zero_shot import template_features


@validated("settings")
class VPTSettings:
    """Settings of VPT; the defaults are those of the shipped configuration (VPT-deep, 73,728 numbers on ViT-B/16).

    Attributes:
        image_tokens: V.
        image_depth: J; 1 is VPT-shallow, more than the tower has means all.
        template: The fixed prompt with {} for the class name.
    """

    image_tokens: Annotated[int, Ge(1), Le(1000)] = 8
    image_depth: Positive = 12
    template: Template = "a photo of a {}."


@register("vpt")
class VPT(PromptMethod):
    """Trained image tokens with zero-shot text."""

    Settings = VPTSettings
    recipe = RecipeConfig(epochs=5, batch_size=4, lr=0.0025)
    needs = Needs(inputs="images", towers="transformers")
    settings: VPTSettings

    def build(self) -> None:
        """Create ``visual.input`` ``[V, W]`` and ``visual.deep``, and encode the text once."""
        settings = self.settings
        self.visual = VisualPrompts(self.backbone.image, settings.image_tokens, settings.image_depth)
        features = template_features(self.backbone, self.class_names, [settings.template])
        self.register_buffer("frozen_text", features, persistent=False)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the fixed prompt."""
        return {"templates": [self.settings.template]}

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the tokens."""
        return self.backbone.encode_image(images, self.visual.tokens())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the fixed unit text features ``[C, D]``."""
        return self.unit_text(self.get_buffer("frozen_text"))

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the image tokens of deeper layers."""
        return [], list(self.visual.deep)
