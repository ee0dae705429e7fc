"""MTA: the views of a test image by their robust mean (Zanella and Ben Ayed, CVPR 2024; arXiv 2405.02266).

No training and no gradients: :mod:`vlprompt.testtime.mta` finds the mode of the views' features, which is scored like
an image feature. The published code encodes all class prompts for every image; here they are encoded once.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Above0, Count, NonNegative, OpenTemplates, validated
from vlprompt.methods.episodic import EpisodicMethod, TemplateViewsMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs, TestViews
from vlprompt.testtime.mta import MeanShift, mean_shift


@validated("settings")
class MTASettings:
    """Settings of MTA; the same for all data sets.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        lambda_q: Weight of the agreement between the views' predictions.
        lambda_y: Weight of the entropy of inlierness scores; above 0.
        crops: Random crops of each image in addition to the test view; 0 is zero-shot.
        augmix: Mix the crops with AugMix; the published code never does.
    """

    templates: OpenTemplates = ()
    lambda_q: NonNegative = 4.0
    lambda_y: Above0 = 0.2
    crops: Count = 63
    augmix: bool = False

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.crops else switched_off("settings.crops is 0", "lambda_q", "lambda_y", "augmix")


@register("mta")
class MTA(TemplateViewsMethod, EpisodicMethod):
    """Robust mean shift over views."""

    Settings = MTASettings
    settings: MTASettings

    @property
    def needs(self) -> Needs:
        """Crops of each test image."""
        return Needs(test_views=TestViews(self.settings.crops, self.settings.augmix))

    def adapt(self, views: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of the modes of B images' views ``[B, V, D]``."""
        return self.score(self.modes(views).mode, self.initial_text_features())

    def modes(self, views: Tensor) -> MeanShift:
        """Return modes, inlierness scores, bandwidths and affinities of B images' views."""
        settings, unit_views = self.settings, self.unit_views(views)
        logits = self.backbone.logit_scale * unit_views @ self.initial_text_features().t()
        return mean_shift(unit_views, logits, lambda_q=settings.lambda_q, lambda_y=settings.lambda_y)
