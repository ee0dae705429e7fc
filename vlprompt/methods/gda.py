"""GDA: a Gaussian classifier in closed form beside zero-shot CLIP (Wang et al., ICLR 2024; arXiv 2402.04087)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlprompt.caches import GDA
from vlprompt.config.types import Count, NonNegative, OpenTemplates, validated
from vlprompt.methods.cached import CachedMethod
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register


@validated("settings")
class GDASettings:
    """Settings of GDA; the defaults are the official ones.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; left open, the data set's own.
        alpha: Weight of the Gaussian classifier, where nothing is searched or there are no validation images.
        views: Random views of each image, each of which counts as an image; 0 takes the test view.
        search: Search alpha among the powers of ten from 0.0001 to 100 on the images that ``select_on`` names.
        select_on: Images that the search is on: val, or, as published for ImageNet, test. Results then say so.
    """

    templates: OpenTemplates = ()
    alpha: NonNegative = 1.0
    views: Count = 10
    search: bool = True
    select_on: Literal["val", "test"] = "val"


@register("gda")
class GDAMethod(CachedMethod):
    """Class means and one covariance; nothing is trained."""

    checked = "equations"
    Settings = GDASettings
    settings: GDASettings
    cache: GDA

    def make_cache(self, text: Tensor, scale: Tensor) -> GDA:
        """Return the unfitted classifier."""
        return GDA(text, scale, alpha=self.settings.alpha)

    def fit(self, shots: FewShotFeatures) -> None:
        """Estimate the Gaussians and search alpha."""
        self.cache.fit(shots.train, shots.labels)
        if self.settings.search and len(shots.val_labels):
            self.cache.search(shots.val, shots.val_labels)
