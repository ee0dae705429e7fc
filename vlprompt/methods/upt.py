"""UPT: context and image tokens out of one small transformer (MVLPT; Shen et al., WACV 2024; arXiv 2211.11720).

``[T', V'] = Block([T, V])``: trained text vectors T and image tokens V of every layer are mapped to a common width,
go through one transformer block, and are mapped back. T' is placed around the class name, V' between class token and
patches. Trained by cross-entropy; several tasks are trained together as one task with all classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Ge, Le, Positive, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import UnifiedPrompts
from vlprompt.prompts.context import ContextLength, Position


@validated("settings")
class UPTSettings:
    """Settings of UPT; the defaults have 566,400 trainable numbers on ViT-B/16.

    Attributes:
        context_length: M text vectors.
        class_token_position: Position of the class name: in the middle of the vectors, after them (end), or in front.
        image_tokens: V image tokens of each layer.
        image_depth: J layers with tokens; more than the tower has means all.
        width: Width of the shared block.
        variant: ``code``: as released, every prompt is a separate sequence, so prompts share the block's weights but do
            not attend to each other. ``paper``: prompts attend to each other.
    """

    context_length: ContextLength = 4
    class_token_position: Position = "middle"
    image_tokens: Annotated[int, Ge(1), Le(1000)] = 4
    image_depth: Positive = 12
    width: Annotated[int, Ge(1), Le(8192)] = 128
    variant: Literal["code", "paper"] = "code"


@register("upt")
class UPT(PromptMethod):
    """Prompts of both towers that share a transformer block."""

    Settings = UPTSettings
    recipe = RecipeConfig(epochs=200)
    needs = Needs(inputs="images", towers="transformers")
    settings: UPTSettings

    def build(self) -> None:
        """Create ``prompts``: ``context.ctx`` ``[M, W]``, ``visual`` ``[J, V, W]``, ``block`` and its maps."""
        settings, text = self.settings, self.backbone.text
        self.prompts = UnifiedPrompts(
            text,
            self.backbone.image,
            settings.context_length,
            settings.image_tokens,
            settings.image_depth,
            settings.width,
            mixing=settings.variant == "paper",
        )
        self.layout = self.prompts.context.layout(text, self.class_names, settings.class_token_position)

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the projected tokens."""
        return self.backbone.encode_image(images, self.prompts.tokens())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]`` of the projected context."""
        return self.once("classes", lambda: self.unit_text(self.encode_text(self.layout, self.prompts.vectors())[0]))

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts."""
        return [self.layout]

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the projected image tokens of deeper layers; the context is not deep."""
        return [], list(self.prompts.tokens().deep.values())
