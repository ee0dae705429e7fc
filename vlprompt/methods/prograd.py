"""ProGrad: CoOp whose steps do not go against zero-shot CLIP (Zhu et al., ICCV 2023; arXiv 2205.14865, equation 4).

The objective ``projected_gradient`` takes from the gradient of cross-entropy what conflicts with the gradient of
agreeing with the frozen model's predictions. With words, the official code aligns them to the right: M context vectors,
zeros first, and counts words by spaces, so that behind a comma the last word stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Above0, NonNegative, OpenTemplates, validated
from vlprompt.errors import ConfigError
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.prompts import TextContext, words_of


@validated("settings")
class ProGradSettings(CoOpSettings):
    """Settings of ProGrad: those of CoOp, and the projection's.

    Attributes:
        context_length: M vectors, also when words are given.
        context_init: Words to start from, aligned to the right; "template" takes the words of the template.
        class_specific: A set of vectors for every class instead of one for all.
        class_token_position: Where the class name stands; middle fails in the official code.
        strength: How much of the conflicting part is taken away (the paper's lambda).
        temperature: Divides both logits of the general loss.
        templates: The frozen model's prompt; left open, the data set's own. The official table words them otherwise
            than CoOp ("a type of pet, a photo of a {}."), which ``configs/prograd`` has.
    """

    strength: NonNegative = 1.0
    temperature: Above0 = 1.0
    templates: OpenTemplates = ()


@register("prograd")
class ProGrad(CoOp):
    """CoOp with the objective ``projected_gradient``."""

    Settings = ProGradSettings
    recipe = RecipeConfig(epochs=100)
    template_setting = "templates"
    settings: ProGradSettings

    def build(self) -> None:
        """Create ``prompt.ctx`` as CoOp does, or zeros with the words' embeddings at the right end."""
        own, text = self.settings, self.backbone.text
        words = own.context_init
        if words == "template":
            words = own.templates[0].split("{}")[0].strip()
        words = words_of(words)
        if not words:
            super().build()
            return
        count = len(words.split(" "))
        if count > own.context_length:
            raise ConfigError(
                f"settings.context_init has {count} words but settings.context_length is {own.context_length}; raise it"
            )
        classes = len(self.class_names) if own.class_specific else None
        self.prompt = TextContext(text, own.context_length, "", classes)
        start = torch.zeros_like(self.prompt.ctx)
        start[..., own.context_length - count :, :] = text.embed(text.tokens(words)[1:-1][:count])
        self.prompt.ctx.data.copy_(start)
        self.prompt.placeholder = " ".join([*["X"] * (own.context_length - count), words])
        self.layout = self.prompt.layout(text, self.class_names, own.class_token_position)

    def own_objectives(self) -> dict[str, dict[str, Any]]:
        """Return the projection."""
        own = self.settings
        projection = {"strength": own.strength, "temperature": own.temperature, "templates": own.templates}
        return {"projected_gradient": projection}
