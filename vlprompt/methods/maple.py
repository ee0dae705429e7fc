"""MaPLe: image prompts are linear maps of text prompts (Khattak et al., CVPR 2023; arXiv 2210.03117, equation 8).

Deep text context of depth J; at each of these layers the image tokens are a linear map of the text vectors, with a
separate map for each layer. Trained by cross-entropy.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Positive, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts import CoupledPrompts
from vlprompt.prompts.context import ContextLength
from vlprompt.prompts.deep import unused_words


@validated("settings")
class MaPLeSettings:
    """Settings of MaPLe; the defaults are those of base-to-new (3,555,072 numbers on ViT-B/16).

    Cross-data-set runs use depth 3.

    Attributes:
        context_length: M text vectors and image tokens.
        context_init: Initial words. With two vectors only "a photo" is trained; "of a" remains fixed before the name.
        depth: J layers of both towers; more than the towers have means all.
    """

    context_length: ContextLength = 2
    context_init: str = "a photo of a"
    depth: Positive = 9

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return unused_words(self.context_length)


@register("maple")
class MaPLe(PromptMethod):
    """Coupled prompts of both towers."""

    Settings = MaPLeSettings
    recipe = RecipeConfig(epochs=5, batch_size=4, lr=0.0035)
    needs = Needs(inputs="images", towers="transformers")
    settings: MaPLeSettings

    def build(self) -> None:
        """Create ``prompts``: ``context.ctx``, ``context.deep``, ``proj`` and ``projections``."""
        settings, text = self.settings, self.backbone.text
        self.prompts = CoupledPrompts(
            text, self.backbone.image, settings.context_length, settings.context_init, settings.depth
        )
        self.layout = self.prompts.context.layout(text, self.class_names)

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` with the mapped tokens."""
        return self.backbone.encode_image(images, self.prompts.tokens())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features ``[C, D]`` of the learned prompts."""
        context = self.prompts.context
        return self.once(
            "classes", lambda: self.unit_text(self.encode_text(self.layout, context.ctx, context.layers())[0])
        )

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts."""
        return [self.layout]

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the deep text prompts and the image prompts computed from them."""
        return list(self.prompts.context.deep), self.prompts.image_prompts()[1:]

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""
        return len(self.prompts.context.deep)
