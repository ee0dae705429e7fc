"""PromptSRC: self-regulating prompts (Khattak et al., ICCV 2023; arXiv 2307.06948, equations 3 to 9).

IVLP's prompts with two objectives: ``self_regularisation``, which holds text features, image features and predictions
near those of the frozen model, and ``aggregation``, which averages the prompts of all epochs under a bell curve.
"""

from __future__ import annotations

from typing import Any

from vlprompt.config.types import Above0, NonNegative, validated
from vlprompt.methods.ivlp import IVLP, IVLPSettings
from vlprompt.methods.registry import register


@validated("settings")
class PromptSRCSettings(IVLPSettings):
    """Settings of PromptSRC; the defaults are those of base-to-new.

    Cross-data-set runs take depth 3, mean 6 and deviation 10.

    Attributes:
        context_length: M text vectors.
        context_init: Words to start from.
        text_depth: Layers with text context of their own.
        image_tokens: V image tokens.
        image_depth: Layers with image tokens of their own.
        text_weight: Weight of the text features' term.
        image_weight: Weight of the image features' term.
        logits_weight: Weight of the predictions' term.
        aggregate: Whether prompts are averaged over epochs.
        aggregation_mean: The epoch, from 1, that weighs most.
        aggregation_deviation: Width of the curve in epochs.
    """

    text_weight: NonNegative = 25.0
    image_weight: NonNegative = 10.0
    logits_weight: NonNegative = 1.0
    aggregate: bool = True
    aggregation_mean: float = 15.0
    aggregation_deviation: Above0 = 1.0


@register("promptsrc")
class PromptSRC(IVLP):
    """IVLP with the objectives ``self_regularisation`` and ``aggregation``."""

    Settings = PromptSRCSettings
    settings: PromptSRCSettings

    def own_objectives(self) -> dict[str, dict[str, Any]]:
        """Return the regularisers and, if asked for, the aggregation."""
        own = self.settings
        found: dict[str, dict[str, Any]] = {
            "self_regularisation": {"text": own.text_weight, "image": own.image_weight, "logits": own.logits_weight}
        }
        if own.aggregate:
            found["aggregation"] = {"mean": own.aggregation_mean, "deviation": own.aggregation_deviation}
        return found
