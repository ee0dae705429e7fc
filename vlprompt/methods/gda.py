"""GDA: a Gaussian classifier in closed form, added to zero-shot CLIP (Wang et al., ICLR 2024; arXiv 2402.04087)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vlprompt.caches.gda import GDA, GDACacheSettings
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs


@validated("settings")
class GDASettings(GDACacheSettings):
    """Settings of GDA; the defaults are the official ones.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        alpha: Weight of the Gaussian classifier, used without a search or without validation images.
        views: Random views of each image, used as separate images; 0 uses the test view.
        view: Kind of these views, as in ``data.transform``: ``random-half``, crops of at least half of the area, or, as
            published for ImageNet, ``random``, of 8 to 100 % of it.
        search: Search alpha among the powers of ten from 0.0001 to 100 on the images selected by ``select_on``.
        select_on: Images of the search: val, or, as published for ImageNet, test, which marks the results.
    """

    templates: OpenTemplates = ()
    views: Count = 10
    view: Literal["random", "random-half"] = "random-half"
    search: bool = True
    select_on: Literal["val", "test"] = "val"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return {} if self.search else switched_off("settings.search is false", "select_on")

    def searched(self) -> dict[str, str]:
        """Return the settings that a search replaces if there are images to search on, with the reason."""
        return switched_off("settings.search is true, which chooses it", "alpha") if self.search else {}


@register("gda")
class GDAMethod(FittedMethod):
    """Class means and one covariance; nothing is trained."""

    checked = "equations"
    Settings = GDASettings
    settings: GDASettings
    Cache = GDA

    @property
    def needs(self) -> Needs:
        """Features of ``views`` random views of the kind ``view``."""
        return dataclasses.replace(super().needs, fit_view=self.settings.view)

    def fit(self, shots: FewShotFeatures) -> None:
        """Estimate the Gaussians and search alpha."""
        self.cache.fit(shots.train, shots.labels)
        if self.settings.search and len(shots.val_labels):
            self.cache.search(shots.val, shots.val_labels)
