"""KgCoOp: CoOp that stays near the hand-written prompt (Yao et al., CVPR 2023; arXiv 2303.13283, equation 5).

Cross-entropy, plus ``weight * (1 - mean cosine)`` between the learned and the template's text features: the objective
``knowledge``. The official code uses "a photo of a" for any initial words; here the given words are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import validated
from vlprompt.methods.coop import CoOp, CoOpSettings
from vlprompt.methods.registry import register
from vlprompt.objectives.knowledge import KnowledgeSettings


@validated("settings")
class KgCoOpSettings(CoOpSettings):
    """Settings of KgCoOp: those of CoOp and of the knowledge term.

    Attributes:
        context_length: M, when no words are given.
        context_init: Initial words.
        class_specific: Use separate vectors for every class instead of shared vectors.
        class_token_position: Position of the class name; the official code ignores it and uses end.
        knowledge: The knowledge term. The official template differs from CoOp's for DTD: "a photo of a {}, a type of
            texture.", which ``configs/kgcoop`` has.
    """

    context_init: str = "a photo of a"
    knowledge: KnowledgeSettings = KnowledgeSettings(weight=8.0)
    renamed: ClassVar[Mapping[str, str]] = {
        "knowledge_weight": "knowledge.weight",
        "variant": "knowledge.variant",
        "templates": "knowledge.templates",
    }


@register("kgcoop")
class KgCoOp(CoOp):
    """CoOp with the objective ``knowledge``."""

    Settings = KgCoOpSettings
    recipe = RecipeConfig(epochs=100, batch_size=128)
    settings: KgCoOpSettings
