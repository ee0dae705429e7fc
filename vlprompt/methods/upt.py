"""UPT: context and image tokens out of one small transformer (MVLPT; Shen et al., WACV 2024; arXiv 2211.11720).

``[T', V'] = Block([T, V])``: learned text vectors T and image tokens V of every layer are brought to a common width,
go through one transformer block, and are brought back; T' stands around the class name, V' between class token and
patches. Trained by cross-entropy; several tasks are learned together as one task with the classes of all.
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
    """Settings of UPT; the defaults learn 566,400 numbers on ViT-B/16.

    Attributes:
        context_length: M text vectors.
        class_token_position: Where the class name stands: amid the vectors, behind them (end), or in front of them.
        image_tokens: V image tokens of each layer.
        image_depth: J layers with tokens of their own; more than there are means all.
        width: Width of the shared block.
        variant: ``code``: as released, the block sees every prompt as a sequence of its own, so that prompts share its
            weights but never meet. ``paper``: they attend to each other.
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
        own, text = self.settings, self.backbone.text
        self.prompts = UnifiedPrompts(
            text,
            self.backbone.image,
            own.context_length,
            own.image_tokens,
            own.image_depth,
            own.width,
            mixing=own.variant == "paper",
        )
        self.layout = self.prompts.context.layout(text, self.class_names, own.class_token_position)

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
