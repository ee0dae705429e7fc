"""KgCoOp: CoOp that stays near the hand-written prompt (Yao et al., CVPR 2023; arXiv 2303.13283, equation 5).

Cross-entropy, plus ``weight * (1 - mean cosine)`` between the learned and the template's text features: the objective
``knowledge``. The official code starts from "a photo of a" whenever any words are given; here they are the words.
"""

from __future__ import annotations

from typing import Any, Literal

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import NonNegative, OpenTemplates, validated
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register


@validated("settings")
class KgCoOpSettings(CoOpSettings):
    """Settings of KgCoOp: those of CoOp, and the knowledge term's.

    Attributes:
        context_length: M, when no words are given.
        context_init: Words to start from.
        class_specific: A set of vectors for every class instead of one for all.
        class_token_position: Where the class name stands; the official code ignores it and takes end.
        knowledge_weight: Factor of the knowledge term.
        variant: "code", one minus the mean cosine, or "paper", the mean squared distance.
        templates: The hand-written prompt; left open, the data set's own. The official table differs from CoOp's for
            DTD: "a photo of a {}, a type of texture.", which ``configs/kgcoop/base.yaml`` has.
    """

    context_init: str = "a photo of a"
    knowledge_weight: NonNegative = 8.0
    variant: Literal["code", "paper"] = "code"
    templates: OpenTemplates = ()


@register("kgcoop")
class KgCoOp(CoOp):
    """CoOp with the objective ``knowledge``."""

    Settings = KgCoOpSettings
    recipe = RecipeConfig(epochs=100, batch_size=128)
    template_setting = "templates"
    settings: KgCoOpSettings

    def own_objectives(self) -> dict[str, dict[str, Any]]:
        """Return the knowledge term."""
        own = self.settings
        return {"knowledge": {"weight": own.knowledge_weight, "templates": own.templates, "variant": own.variant}}
