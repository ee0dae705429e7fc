"""APE: Tip-Adapter on chosen channels, with weighted values; training-free (Zhu et al., ICCV 2023; arXiv 2304.01195).

The published text classifier averages the templates and sentences of a language model for each class (CuPL), which
``templates`` takes as a file; by default it averages the templates alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from vlprompt.caches.ape import APE, APECacheSettings
from vlprompt.caches.search import grid
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, Ge, NonNegative, OpenTemplates, Positive, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod, keys_of
from vlprompt.methods.registry import register


@validated("settings")
class APESettings(APECacheSettings):
    """Settings of APE; the defaults are the official ones for ImageNet.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        channels: Number of selected channels; 0 selects half of them, rounded up. Published numbers are for 1,024.
        likeness_weight: Weight of the similarity between classes in a channel's score.
        variance_weight: Weight of the variance of the text features in a channel's score.
        alpha: Weight of the cache, used without a search or without validation images.
        beta: Sharpness of the affinities, likewise.
        gamma: Weight of the values' divergence, likewise.
        views: Random views averaged into the key of each image; 0 uses the test view.
        search: Search alpha, beta and gamma on the images selected by ``select_on``.
        search_alpha: Upper end of the searched alphas; the lower end is 0.1.
        search_beta: Upper end of the searched betas; the lower end is 0.1.
        search_gamma: Upper end of the searched gammas; the lower end is 0, where all keys count alike.
        search_steps: Numbers of betas, alphas and gammas.
        select_on: Images of the search: val, or, as published for ImageNet, test, which marks the results.
    """

    templates: OpenTemplates = ()
    views: Count = 10
    search: bool = True
    search_alpha: Annotated[float, Ge(0.1)] = 7.0
    search_beta: Annotated[float, Ge(0.1)] = 7.0
    search_gamma: NonNegative = 0.5
    search_steps: tuple[Positive, Positive, Positive] = (200, 20, 5)
    select_on: Literal["val", "test"] = "val"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        names = ("search_alpha", "search_beta", "search_gamma", "search_steps", "select_on")
        return {} if self.search else switched_off("settings.search is false", *names)

    def searched(self) -> dict[str, str]:
        """Return the settings that a search replaces if there are images to search on, with the reason."""
        return (
            switched_off("settings.search is true, which chooses it", "alpha", "beta", "gamma") if self.search else {}
        )


@register("ape")
class APEMethod(FittedMethod):
    """A key of selected channels for each few-shot image; nothing is trained."""

    checked = "equations"
    Settings = APESettings
    settings: APESettings
    Cache = APE

    def fit(self, shots: FewShotFeatures) -> None:
        """Select the channels, fill the cache and search alpha, beta and gamma."""
        settings = self.settings
        self.cache.fit(keys_of(shots, settings.views)[0], shots.labels)
        if settings.search and len(shots.val_labels):
            tops = (settings.search_beta, settings.search_alpha, settings.search_gamma)
            starts = (0.1, 0.1, 0.0)
            axes = [grid(*axis) for axis in zip(tops, settings.search_steps, starts, strict=True)]
            self.cache.search(shots.val, shots.val_labels, *axes)
