"""VP: learned pixels, added to every image (Bahng et al., 2022; arXiv 2203.17274).

``x' = x + P``, where x is the normalised image and P a border or a patch, at a fixed or random place, of trained
pixels. The text is frozen, "This is a photo of a NAME" without a period and with hyphens as spaces, and encoded once.
Trained by cross-entropy, with SGD at a rate of 40 without weight decay. Works with every image tower. The recipe is
that of the few-shot runs of changdaeoh/BlackVIP; ``configs/visual_prompt`` has the paper's, too.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator
from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import OpenTemplates, Positive, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import PixelPrompt
from vlprompt.prompts.pixels import Shape
from vlprompt.prompts.zero_shot import template_features


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TemplateOrTemplates: TypeAlias = Annotated[OpenTemplates, BeforeValidator(_as_list)]


@validated("settings")
class VisualPromptSettings:
    """Settings of VP; the defaults have 69,840 trainable numbers at 224 x 224 pixels.

    Attributes:
        shape: ``border`` (the paper's padding), ``fixed_patch`` at the top left, or ``random_patch``, at a new
            random place in every training step.
        prompt_size: p, the border's width or the patch's side in pixels.
        template: The fixed prompt with {} for the class name, or several, which are averaged; an empty list for the
            data set's own.
        split_hyphens: Whether hyphens in class names become spaces in templates, as in VP's code, but not in
            BlackVIP's.
    """

    shape: Shape = "border"
    prompt_size: Positive = 30
    template: TemplateOrTemplates = ("This is a photo of a {}",)
    split_hyphens: bool = True

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        texts = not all(isinstance(text, str) for text in self.template)
        return switched_off("settings.template has sentences of classes", "split_hyphens") if texts else {}


@register("visual_prompt")
class VisualPrompt(PromptMethod):
    """Trained pixels with zero-shot text."""

    Settings = VisualPromptSettings
    recipe = RecipeConfig(
        epochs=1000, batch_size=64, lr=40.0, warmup="linear", warmup_epochs=100, warmup_lr=0.1, weight_decay=0.0
    )
    needs = Needs(inputs="images")
    settings: VisualPromptSettings

    def build(self) -> None:
        """Create ``prompt`` (``up``, ``down``, ``left``, ``right``, or ``patch``), and encode the text once."""
        settings = self.settings
        self.prompt = PixelPrompt(self.backbone.preprocess.size, settings.prompt_size, settings.shape)
        names = self.class_names
        if settings.split_hyphens and all(isinstance(text, str) for text in settings.template):
            names = [name.replace("-", " ") for name in names]  # texts of classes are found by the names as they are
        features = template_features(self.backbone, names, settings.template)
        self.register_buffer("frozen_text", features, persistent=False)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the fixed prompt."""
        return {"templates": self.settings.template}

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the prompt."""
        return self.prompt.encode(self.backbone.image, images)

    @property
    def in_towers(self) -> bool:
        """Return True: the pixels are folded into the position embedding."""
        return True

    def image_overrides(self) -> dict[str, Tensor]:
        """Return a vision transformer's position embedding with the prompt folded in."""
        return self.backbone.image.folded(self.prompt.pixels()) or {}

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the fixed unit text features ``[C, D]``."""
        return self.unit_text(self.get_buffer("frozen_text"))
