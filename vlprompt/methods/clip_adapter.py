"""CLIP-Adapter: a bottleneck adapter on image features, blended with the frozen ones (IJCV 2024; arXiv 2110.04544).

An image's raw feature g becomes ``g' = ratio A(g) + (1 - ratio) g`` with ``A(g) = relu(relu(g W_1) W_2)`` (the visual
adapter, as in the official code gaopengcuhk/CLIP-Adapter), is normalised and compared with the text features of a
hand-written prompt. A is initialised randomly: an untrained head is not zero-shot CLIP. The towers are frozen, so
training uses features that are computed once; other classes need only their text features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import Fraction, OpenTemplates, Positive, validated
from vlprompt.methods.base import PromptMethod
from vlprompt.methods.registry import register
from vlprompt.prompts import FeatureAdapter
from vlprompt.prompts.zero_shot import template_features


@validated("settings")
class CLIPAdapterSettings:
    """Settings of CLIP-Adapter; the defaults are those of the official code.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        ratio: Weight of the adapted feature in the blend, 0 to 1; 0 is zero-shot. The paper tunes it per data set.
        reduction: The hidden layer has D // reduction units.
    """

    templates: OpenTemplates = ()
    ratio: Fraction = 0.2
    reduction: Positive = 4


@register("clip_adapter")
class CLIPAdapter(PromptMethod):
    """Two linear layers on the image features, trained by cross-entropy."""

    checked = "equations"
    Settings = CLIPAdapterSettings
    recipe = RecipeConfig(epochs=200)
    settings: CLIPAdapterSettings

    def build(self) -> None:
        """Create ``adapter.down.weight`` ``[D // reduction, D]`` and ``adapter.up.weight``, and encode the prompts."""
        self.adapter = FeatureAdapter(self.backbone.embed_dim, self.settings.reduction)
        weights = template_features(self.backbone, self.class_names, self.settings.templates)
        self.register_buffer("weights", weights, persistent=False)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own texts."""
        return {"templates": self.settings.templates}

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the frozen unit text features ``[C, D]``."""
        return self.unit_text(self.get_buffer("weights"))

    def unit_image(self, features: Tensor) -> Tensor:
        """Return the unit blend ``[B, D]`` of raw image ``features`` ``[B, D]`` and adapted features."""
        ratio = self.settings.ratio
        return super().unit_image(ratio * self.adapter(features) + (1 - ratio) * features)
