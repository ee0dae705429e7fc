"""PromptSRC: self-regulating prompts (Khattak et al., ICCV 2023; arXiv 2307.06948, equations 3 to 9).

IVLP's prompts with two objectives: ``self_regularisation``, which keeps text features, image features and predictions
near those of the frozen model, and ``aggregation``, which averages the prompts of all epochs with Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlprompt.config.types import validated
from vlprompt.methods.ivlp import IVLP, IVLPSettings
from vlprompt.methods.registry import register
from vlprompt.objectives.aggregation import AggregationSettings
from vlprompt.objectives.self_regularisation import SelfRegularisationSettings


@validated("settings")
class PromptSRCSettings(IVLPSettings):
    """Settings of PromptSRC; the defaults are those of base-to-new.

    Cross-data-set runs use depth 3, mean 6 and deviation 10.

    Attributes:
        context_length: M text vectors.
        context_init: Initial words.
        text_depth: Layers that have text context.
        image_tokens: V image tokens.
        image_depth: Layers that have image tokens.
        self_regularisation: The terms that keep features and predictions near those of the frozen model.
        aggregation: The average of the prompts over epochs; None to disable.
    """

    self_regularisation: SelfRegularisationSettings = SelfRegularisationSettings(text=25.0, image=10.0, logits=1.0)
    aggregation: AggregationSettings | None = AggregationSettings(mean=15.0, deviation=1.0)
    renamed: ClassVar[Mapping[str, str]] = {
        "text_weight": "self_regularisation.text",
        "image_weight": "self_regularisation.image",
        "logits_weight": "self_regularisation.logits",
        "aggregate": "aggregation (null for none)",
        "aggregation_mean": "aggregation.mean",
        "aggregation_deviation": "aggregation.deviation",
    }


@register("promptsrc")
class PromptSRC(IVLP):
    """IVLP with the objectives ``self_regularisation`` and ``aggregation``."""

    Settings = PromptSRCSettings
    settings: PromptSRCSettings
