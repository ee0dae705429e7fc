"""LP++: a linear probe blended with the text classifier by learned factors (Huang et al., CVPR 2024; arXiv 2404.02285).

``logits_k = f w_k + b_k + alpha_k (f t_k)`` are trained by gradient steps on all images at once, with step sizes
computed from the data. Official code: FereshteShakeri/FewShot-CLIP-Strong-Baseline, which never resets the gradient of
alpha; ``accumulate: false`` resets it. Each image has one random view, whose feature is computed once.
"""

from __future__ import annotations

from typing import Literal

from vlprompt.caches.lp_plus_plus import LPPlusPlus, LPPlusPlusCacheSettings
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register


@validated("settings")
class LPPlusPlusSettings(LPPlusPlusCacheSettings):
    """Settings of LP++; the defaults are the official ones.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        iterations: Number of steps.
        momentum: Momentum of the steps of w and b, in [0, 1).
        alpha_every: Iterations between steps of alpha.
        alpha_start: Initial alpha, as a factor of the mean cosine of images and their class's text.
        accumulate: Sum the gradient of alpha over all iterations so far, as the official code does; otherwise use
            that of one iteration.
        views: Random views of each image, used as separate images; 0 uses the test view.
        search: Keep the best iteration on the images selected by ``select_on``, the last of equals; otherwise the
            last.
        select_on: Images for the choice of the iteration: val, or test, which marks the results.
    """

    templates: OpenTemplates = ()
    views: Count = 1
    search: bool = True
    select_on: Literal["val", "test"] = "val"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.search else switched_off("settings.search is false", "select_on")


@register("lp_plus_plus")
class LPPlusPlusMethod(FittedMethod):
    """A linear classifier ``[C, D]`` with biases, and a factor ``[C]`` for the text classifier."""

    checked = "equations"
    Settings = LPPlusPlusSettings
    settings: LPPlusPlusSettings
    Cache = LPPlusPlus
    own_draws = ("the initial biases",)

    def fit(self, shots: FewShotFeatures) -> None:
        """Train, and keep the best iteration on the validation images, if any."""
        val = (shots.val, shots.val_labels) if self.settings.search else None
        self.cache.fit(shots.train, shots.labels, val=val, seed=shots.seed)
