"""ProGrad: CoOp whose steps do not go against zero-shot CLIP (Zhu et al., ICCV 2023; arXiv 2205.14865, equation 4).

The objective ``projected_gradient`` removes from the gradient of cross-entropy the component that conflicts with the
gradient of agreement with the frozen model's predictions. With words, the official code aligns them to the right: M
context vectors, zeros first, and counts words by spaces, so after a comma the last word remains fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import validated
from vlprompt.errors import ConfigError
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.objectives.projection import ProjectedGradientSettings
from vlprompt.prompts import TextContext, words_of
from vlprompt.prompts.zero_shot import plain_template


@validated("settings")
class ProGradSettings(CoOpSettings):
    """Settings of ProGrad: those of CoOp and of the projection.

    Attributes:
        context_length: M vectors, also when words are given.
        context_init: Initial words, aligned to the right; "template" uses the words of the template.
        class_specific: Use separate vectors for every class instead of shared vectors.
        class_token_position: Position of the class name; middle fails in the official code.
        projected_gradient: The projection. The official templates differ from CoOp's ("a type of pet, a photo of a
            {}."), which ``configs/prograd`` has.
    """

    projected_gradient: ProjectedGradientSettings = ProjectedGradientSettings()
    renamed: ClassVar[Mapping[str, str]] = {
        "strength": "projected_gradient.strength",
        "temperature": "projected_gradient.temperature",
        "templates": "projected_gradient.templates",
    }

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {}


@register("prograd")
class ProGrad(CoOp):
    """CoOp with the objective ``projected_gradient``."""

    Settings = ProGradSettings
    recipe = RecipeConfig(epochs=100)
    settings: ProGradSettings

    def build(self) -> None:
        """Create ``prompt.ctx`` as CoOp does, or zeros with the words' embeddings at the right end."""
        settings, text = self.settings, self.backbone.text
        words = settings.context_init
        if words == "template":
            key = "settings.projected_gradient.templates"
            words = plain_template(settings.projected_gradient.templates[0], key).split("{}")[0].strip()
        words = words_of(words)
        if not words:
            super().build()
            return
        count = len(words.split(" "))
        if count > settings.context_length:
            raise ConfigError(
                f"settings.context_init has {count} words but settings.context_length is "
                f"{settings.context_length}; raise it"
            )
        classes = len(self.class_names) if settings.class_specific else None
        self.prompt = TextContext(text, settings.context_length, "", classes)
        start = torch.zeros_like(self.prompt.ctx)
        start[..., settings.context_length - count :, :] = text.embed(text.tokens(words)[1:-1][:count])
        self.prompt.ctx.data.copy_(start)
        self.prompt.placeholder = " ".join([*["X"] * (settings.context_length - count), words])
        self.layout = self.prompt.layout(text, self.class_names, settings.class_token_position)
