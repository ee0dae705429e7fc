"""RESTORE: text and image prompts whose features shift alike (arXiv 2403.06136; official code: Yaphabates/RESTORE_).

MaPLe's prompts with two objectives: ``shift_consistency``, which keeps the shifts of text and image alike, and
``surgery``, residual adapters that keep both from growing together. The paper speaks of shifts of embeddings; the code,
whose numbers are published, takes the norms of the prompts' Gram matrices in their place: ``variant`` selects.
"""

from __future__ import annotations

from typing import Any, Literal

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import NonNegative, validated
from vlprompt.methods.maple import MaPLe, MaPLeSettings
from vlprompt.methods.registry import register


@validated("settings")
class RESTORESettings(MaPLeSettings):
    """Settings of RESTORE; ratios and weight differ by data set in the official scripts: see ``configs/restore``.

    Attributes:
        context_length: M text vectors and image tokens.
        context_init: Words to start from.
        depth: J layers of both towers.
        shift_weight: Factor of the consistency term.
        variant: "code", the official surrogate of the shift, or "paper", its definition as this library reads it.
        surgery: Whether features go through the adapters.
        text_ratio: How much of the adapter enters text features.
        image_ratio: The same for image features.
    """

    shift_weight: NonNegative = 1.0
    variant: Literal["code", "paper"] = "code"
    surgery: bool = True
    text_ratio: NonNegative = 0.1
    image_ratio: NonNegative = 0.1


@register("restore")
class RESTORE(MaPLe):
    """MaPLe with the objectives ``surgery`` and ``shift_consistency``."""

    Settings = RESTORESettings
    recipe = RecipeConfig(epochs=10, batch_size=4, lr=0.0035)
    settings: RESTORESettings

    def own_objectives(self) -> dict[str, dict[str, Any]]:
        """Return the adapters and the consistency term."""
        own = self.settings
        found: dict[str, dict[str, Any]] = {}
        if own.surgery:
            found["surgery"] = {"text_ratio": own.text_ratio, "image_ratio": own.image_ratio}
        return {**found, "shift_consistency": {"weight": own.shift_weight, "variant": own.variant}}
