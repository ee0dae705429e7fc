"""LP++: a linear probe blended with the text classifier by learned factors (Huang et al., CVPR 2024; arXiv 2404.02285).

``logits_k = f w_k + b_k + alpha_k (f t_k)`` are trained by gradient steps on all images at once, whose sizes follow
from the data. Official code: FereshteShakeri/FewShot-CLIP-Strong-Baseline, which never sets the gradient of alpha to
zero; ``accumulate: false`` does. Images are seen in one random view, whose feature is computed once.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlprompt.caches import LPPlusPlus
from vlprompt.config.types import Below1, Count, NonNegative, OpenTemplates, Positive, validated
from vlprompt.methods.cached import CachedMethod
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register


@validated("settings")
class LPPlusPlusSettings:
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
    iterations: Count = 300
    momentum: Below1 = 0.9
    alpha_every: Positive = 10
    alpha_start: NonNegative = 250.0
    accumulate: bool = True
    views: Count = 1
    search: bool = True
    select_on: Literal["val", "test"] = "val"


@register("lp_plus_plus")
class LPPlusPlusMethod(CachedMethod):
    """A linear classifier ``[C, D]`` with biases, and a factor ``[C]`` for the text classifier."""

    checked = "equations"
    Settings = LPPlusPlusSettings
    settings: LPPlusPlusSettings
    cache: LPPlusPlus

    def make_cache(self, text: Tensor, scale: Tensor) -> LPPlusPlus:
        """Return the unfitted classifier."""
        own = self.settings
        return LPPlusPlus(
            text,
            scale,
            iterations=own.iterations,
            momentum=own.momentum,
            alpha_every=own.alpha_every,
            alpha_start=own.alpha_start,
            accumulate=own.accumulate,
        )

    def fit(self, shots: FewShotFeatures) -> None:
        """Take the steps; keep the best iteration on the validation images, where there are any."""
        val = (shots.val, shots.val_labels) if self.settings.search else None
        self.cache.fit(shots.train, shots.labels, val=val, seed=shots.seed)
