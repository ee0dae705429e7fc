"""Linear probe: logistic regression on frozen image features, without text (Radford et al., 2021; arXiv 2103.00020).

``logits = f W^T + b`` minimise the mean cross-entropy and ``|W|^2 / (2 c N)``. The few-shot protocol of CoOp's appendix
(KaiyangZhou/CoOp, lpclip) fits on raw features and chooses c on validation images: seven powers of ten, then eight
halvings around the best.
"""

from __future__ import annotations

from typing import Literal

from vlprompt.caches.linear_probe import LinearProbe, LinearProbeCacheSettings
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register


@validated("settings")
class LinearProbeSettings(LinearProbeCacheSettings):
    """Settings of the linear probe; the defaults are those of the few-shot protocol.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``, for zero-shot initialisation and the unfitted method;
            default: the template of the data set.
        c: Inverse strength of the penalty, used without a search or without validation images; the default is that of
            CLIP's README.
        search: Choose c on the images selected by ``select_on``.
        normalised: Normalise features to length 1; the few-shot protocol and CLIP's README use raw features.
        start: Initial W: zero, or zeroshot for the text classifier times the logit scale. It has an effect if the
            iterations end before the minimum.
        iterations: Maximum number of L-BFGS steps.
        views: Random views of each image, used as separate images; 0 uses the test view.
        select_on: Images for the choice of c: val, or test, which marks the results.
    """

    templates: OpenTemplates = ()
    search: bool = True
    views: Count = 0
    select_on: Literal["val", "test"] = "val"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.search else switched_off("settings.search is false", "select_on")

    def searched(self) -> dict[str, str]:
        """Return the settings that a search replaces if there are images to search on, with the reason."""
        return switched_off("settings.search is true, which chooses it", "c") if self.search else {}


@register("linear_probe")
class LinearProbeMethod(FittedMethod):
    """A linear classifier ``[C, D]`` with biases, found by L-BFGS."""

    checked = "equations"
    Settings = LinearProbeSettings
    settings: LinearProbeSettings
    Cache = LinearProbe

    def fit(self, shots: FewShotFeatures) -> None:
        """Fit the classifier, and c if it is searched."""
        self.cache.fit(shots.train, shots.labels, val=(shots.val, shots.val_labels) if self.settings.search else None)
