"""Linear probe: logistic regression on frozen image features, without text (Radford et al., 2021; arXiv 2103.00020).

``logits = f W^T + b`` minimise the mean cross-entropy and ``|W|^2 / (2 c N)``. The few-shot protocol of CoOp's appendix
(KaiyangZhou/CoOp, lpclip) chooses c on validation images: seven powers of ten, then eight halvings about the best.
"""

from __future__ import annotations

from typing import Literal

from vlprompt.caches.linear_probe import LinearProbe, LinearProbeCacheSettings
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register


@validated("settings")
class LinearProbeSettings(LinearProbeCacheSettings):
    """Settings of the linear probe; the defaults are those of the few-shot protocol.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``, for the zero-shot start and before anything is fitted;
            left open, the data set's own.
        c: Inverse strength of the penalty, where nothing is searched or there are no validation images: the value of
            CLIP's README.
        search: Choose c on the images that ``select_on`` names.
        normalised: Bring features to length 1 first; CLIP's README regresses on raw ones.
        start: Where W starts: zero, or zeroshot for the text classifier times the logit scale. It counts where the
            iterations stop short of the minimum.
        iterations: The most steps of L-BFGS.
        views: Random views of each image, each of which counts as an image; 0 takes the test view.
        select_on: Images that c is chosen on: val, or test, and results then say so.
    """

    templates: OpenTemplates = ()
    search: bool = True
    views: Count = 0
    select_on: Literal["val", "test"] = "val"


@register("linear_probe")
class LinearProbeMethod(FittedMethod):
    """A linear classifier ``[C, D]`` with biases, found by L-BFGS."""

    checked = "equations"
    Settings = LinearProbeSettings
    settings: LinearProbeSettings
    Cache = LinearProbe

    def fit(self, shots: FewShotFeatures) -> None:
        """Find the classifier, and c where it is searched."""
        self.cache.fit(shots.train, shots.labels, val=(shots.val, shots.val_labels) if self.settings.search else None)
