"""CoOp: learned context vectors in place of prompt words (Zhou et al., IJCV 2022; arXiv 2109.01134).

The prompt of class c is ``[v_1] ... [v_M] [class c] .`` (equation 2; the class token may also be in the middle or in
front). Its classifier row is the unit text feature, and the vectors are trained only by cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlprompt.backbone import TokenLayout
from vlprompt.config.effect import switched_off
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import validated
from vlprompt.errors import ClassNameError
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts import TextContext
from vlprompt.prompts.context import ContextLength, Position


@validated("settings")
class CoOpSettings:
    """Settings of CoOp.

    Attributes:
        context_length: M, when no words are given.
        context_init: Initial words, such as "a photo of a"; M is then their number, and class_specific has no effect.
            Empty: normal noise of deviation 0.02.
        class_specific: Use separate vectors for every class (CSC) instead of shared vectors.
        class_token_position: Position of the class name: after the vectors (end), in their middle, or in front.
    """

    context_length: ContextLength = 16
    context_init: str = ""
    class_specific: bool = False
    class_token_position: Position = "end"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        if not self.context_init:
            return {}
        words = repr(self.context_init)
        return switched_off(
            f"settings.context_init is {words}, and the vectors of words are the same for all classes", "class_specific"
        ) | switched_off(f"settings.context_init is {words}, whose words are counted", "context_length")


@register("coop")
class CoOp(PromptMethod):
    """Shared or class-specific context vectors, trained by cross-entropy."""

    Settings = CoOpSettings
    recipe = RecipeConfig(epochs=200)
    settings: CoOpSettings

    def build(self) -> None:
        """Create ``prompt.ctx``: ``[M, W]``, or ``[C, M, W]`` when class-specific."""
        settings = self.settings
        classes = len(self.class_names) if settings.class_specific else None
        self.prompt = TextContext(self.backbone.text, settings.context_length, settings.context_init, classes)
        self.layout = self.prompt.layout(self.backbone.text, self.class_names, settings.class_token_position)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features of the learned prompts ``[C, D]``."""
        return self.once("classes", lambda: self.unit_text(self.encode_text(self.layout, self.prompt.ctx)[0]))

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layout of the class prompts."""
        return [self.layout]

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return CoOp with the same generic context for other classes.

        Raises:
            ClassNameError: The context is class-specific.
        """
        if self.prompt.class_specific and list(class_names) != self.class_names:
            raise ClassNameError(
                "this CoOp was trained with settings.class_specific, so it has context for its own "
                f"{len(self.class_names)} classes only; other classes need generic context (class_specific: false)"
            )
        return super().with_classes(class_names)
