"""IVLP: independent vision-language prompting, the baseline of MaPLe and PromptSRC (Khattak et al., ICCV 2023).

Independent deep text context and deep image tokens, trained by cross-entropy. Image depth 0 is the "deep language
prompting" of MaPLe's tables.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Ge, Le, Positive, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import DeepContext, VisualPrompts
from vlprompt.prompts.context import ContextLength
from vlprompt.prompts.deep import unused_words


@validated("settings")
class IVLPSettings:
    """Settings of IVLP; the defaults are PromptSRC's (46,080 numbers on ViT-B/16), MaPLe uses 2 and 2 at depth 12.

    Attributes:
        context_length: M text vectors.
        context_init: Initial words; words beyond M remain fixed before the name. Not used above M = 4.
        text_depth: Layers that have text context.
        image_tokens: V image tokens.
        image_depth: Layers that have image tokens; 0 for no image tokens.
    """

    context_length: ContextLength = 4
    context_init: str = "a photo of a"
    text_depth: Positive = 9
    image_tokens: Annotated[int, Ge(1), Le(1000)] = 4
    image_depth: Annotated[int, Ge(0), Le(1000)] = 9

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        off = unused_words(self.context_length)
        return off if self.image_depth else off | switched_off("settings.image_depth is 0", "image_tokens")


@register("ivlp")
class IVLP(PromptMethod):
    """Deep text context and deep image tokens."""

    Settings = IVLPSettings
    recipe = RecipeConfig(epochs=20, batch_size=4, lr=0.0025)
    settings: IVLPSettings

    @property
    def needs(self) -> Needs:
        """Images, unless there are no image tokens."""
        return Needs(inputs="images", towers="transformers") if self.settings.image_depth else Needs()

    def build(self) -> None:
        """Create ``context`` (``ctx`` and ``deep``) and ``visual`` (``input`` and ``deep``)."""
        settings, text = self.settings, self.backbone.text
        self.context = DeepContext(text, settings.context_length, settings.context_init, settings.text_depth)
        self.layout = self.context.layout(text, self.class_names)
        self.visual = None
        if settings.image_depth:
            self.visual = VisualPrompts(self.backbone.image, settings.image_tokens, settings.image_depth)

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the tokens, if any."""
        return self.backbone.encode_image(images, self.visual.tokens() if self.visual else None)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]`` of the learned prompts."""
        context = self.context
        return self.once(
            "classes", lambda: self.unit_text(self.encode_text(self.layout, context.ctx, context.layers())[0])
        )

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts."""
        return [self.layout]

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the deep prompts of both towers."""
        return list(self.context.deep), list(self.visual.deep) if self.visual else []

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""
        return min(len(self.context.deep), len(self.visual.deep)) if self.visual else 0
