"""LP++: a linear probe blended with the text classifier by learned factors (Huang et al., CVPR 2024; arXiv 2404.02285).

``logits_k = f w_k + b_k + alpha_k (f t_k)`` are trained by gradient steps on all images at once, whose sizes follow
from the data. Official code: FereshteShakeri/FewShot-CLIP-Strong-Baseline, which never sets the gradient of alpha to
zero; ``accumulate: false`` does. Images are seen in one random view, whose feature is computed once.
"""

from __future__ import annotations

from typing import Literal

from vlprompt.caches.lp_plus_plus import LPPlusPlus, LPPlusPlusCacheSettings
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register


@validated("settings")
class LPPlusPlusSettings(LPPlusPlusCacheSettings):
    """Settings of LP++; the defaults are the official ones.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; left open, the data set's own.
        iterations: Steps.
        momentum: Of the steps of w and b, 0 to below 1.
        alpha_every: Alpha takes a step after every so many iterations.
        alpha_start: Alpha starts at this number times the mean cosine of images and their class's text.
        accumulate: Sum the gradient of alpha over all iterations so far, as the official code does; otherwise it is
            that of one iteration.
        views: Random views of each image, each of which counts as an image; 0 takes the test view.
        search: Keep the iteration that is best on the images that ``select_on`` names, the last of equals; otherwise
            the last.
        select_on: Images that the iteration is chosen on: val, or test, and results then say so.
    """

    templates: OpenTemplates = ()
    views: Count = 1
    search: bool = True
    select_on: Literal["val", "test"] = "val"


@register("lp_plus_plus")
class LPPlusPlusMethod(FittedMethod):
    """A linear classifier ``[C, D]`` with biases, and a factor ``[C]`` for the text classifier."""

    checked = "equations"
    Settings = LPPlusPlusSettings
    settings: LPPlusPlusSettings
    Cache = LPPlusPlus

    def fit(self, shots: FewShotFeatures) -> None:
        """Take the steps; keep the best iteration on the validation images, where there are any."""
        val = (shots.val, shots.val_labels) if self.settings.search else None
        self.cache.fit(shots.train, shots.labels, val=val, seed=shots.seed)
