"""ZERO: the confident views of a test image vote (Farina et al., NeurIPS 2024; arXiv 2405.18330).

The marginal probability over confident views at temperature zero is the count of their arg-maxes, with the paper's rule
for ties. The official code divides cosines by the smallest step of half precision instead (FarinaMatteo/zero,
ttas/zero.py 80-81), which gives slightly soft votes without ties: ``temperature: 0.0009765625``.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, NonNegative, OpenTemplates, validated
from vlprompt.methods.episodic import EpisodicMethod, TemplateViewsMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs, TestViews
from vlprompt.testtime.selection import ViewFraction
from vlprompt.testtime.zero import Votes, ranked_logits, vote


@validated("settings")
class ZEROSettings:
    """Settings of ZERO; the same for all data sets.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        confidence: Fraction of the views that vote, those with the lowest entropy.
        temperature: Temperature of the votes, a divisor of cosines; 0 for one vote per view.
        crops: Random crops of each image in addition to the test view; 0 is zero-shot.
        augmix: Mix the crops with AugMix; the published code never does.
    """

    templates: OpenTemplates = ()
    confidence: ViewFraction = 0.3
    temperature: NonNegative = 0.0
    crops: Count = 63
    augmix: bool = False

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.crops else switched_off("settings.crops is 0", "confidence", "temperature", "augmix")


@register("zero")
class ZERO(TemplateViewsMethod, EpisodicMethod):
    """Votes of confident views."""

    checked = "equations"
    Settings = ZEROSettings
    settings: ZEROSettings

    @property
    def needs(self) -> Needs:
        """Crops of each test image."""
        return Needs(test_views=TestViews(self.settings.crops, self.settings.augmix))

    def adapt(self, views: Tensor) -> Tensor:
        """Return ``[B, C]``: the zero-shot logits of the test view, permuted into the order of the votes.

        The largest logit is at ZERO's prediction (:func:`vlprompt.testtime.zero.ranked_logits`).
        """
        logits = self.view_logits(views)
        return ranked_logits(self._vote(logits), logits[:, 0])

    def votes(self, views: Tensor) -> Votes:
        """Return counts, voters and winners of B images from their views ``[B, V, D]``."""
        return self._vote(self.view_logits(views))

    def _vote(self, logits: Tensor) -> Votes:
        return vote(logits, self.settings.confidence, float(self.backbone.logit_scale) * self.settings.temperature)

    def view_logits(self, views: Tensor) -> Tensor:
        """Return the logits ``[B, V, C]`` of all views."""
        return self.backbone.logit_scale * self.unit_views(views) @ self.initial_text_features().t()
