"""Tip-Adapter: the few-shot images' features as a key-value cache added to zero-shot CLIP (arXiv 2207.09519).

No training: an image's logits are the zero-shot logits plus ``alpha exp(-beta (1 - f F^T)) V`` (equation 6). F are
the features of the few-shot images, each a mean over random views, and V are their labels. ``alpha`` and ``beta`` are
searched on validation images (official code: gaopengcuhk/Tip-Adapter, which on ImageNet searches on the test images).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from vlprompt.caches.search import grid
from vlprompt.caches.tip_adapter import TipAdapter, TipAdapterCacheSettings
from vlprompt.config.effect import switched_off
from vlprompt.config.types import Count, Ge, OpenTemplates, Positive, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod, keys_of
from vlprompt.methods.registry import register


@validated("settings")
class TipAdapterSettings(TipAdapterCacheSettings):
    """Settings of Tip-Adapter; the defaults are the official ones for ImageNet.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        alpha: Weight of the cache, used without a search or without validation images.
        beta: Sharpness of the affinities, likewise.
        views: Random views averaged into the key of each image; 0 uses the test view.
        search: Search alpha and beta on the images selected by ``select_on``.
        search_alpha: Upper end of the searched alphas; the lower end is 0.1.
        search_beta: Upper end of the searched betas; the lower end is 0.1.
        search_steps: Numbers of betas and of alphas.
        select_on: Images of the search: val, or, as published for ImageNet, test, which marks the results.
    """

    templates: OpenTemplates = ()
    views: Count = 10
    search: bool = True
    search_alpha: Annotated[float, Ge(0.1)] = 3.0
    search_beta: Annotated[float, Ge(0.1)] = 7.0
    search_steps: tuple[Positive, Positive] = (200, 20)
    select_on: Literal["val", "test"] = "val"

    def without_effect(self) -> dict[str, str]:
        """Return the settings that others switch off, with the reason."""
        return (
            {}
            if self.search
            else switched_off("settings.search is false", "search_alpha", "search_beta", "search_steps", "select_on")
        )

    def searched(self) -> dict[str, str]:
        """Return the settings that a search replaces if there are images to search on, with the reason."""
        return switched_off("settings.search is true, which chooses it", "alpha", "beta") if self.search else {}


@register("tip_adapter")
class TipAdapterMethod(FittedMethod):
    """A key for each few-shot image; nothing is trained."""

    Settings: ClassVar[type] = TipAdapterSettings
    settings: TipAdapterSettings
    Cache = TipAdapter

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache and search alpha and beta."""
        self.cache.fit(keys_of(shots, self.settings.views)[0], shots.labels)
        self.search(shots)

    def search(self, shots: FewShotFeatures) -> None:
        """Set alpha and beta to the best on the validation images, if any."""
        settings = self.settings
        if settings.search and len(shots.val_labels):
            betas, alphas = (
                grid(top, steps)
                for top, steps in zip((settings.search_beta, settings.search_alpha), settings.search_steps, strict=True)
            )
            self.cache.search(shots.val, shots.val_labels, betas, alphas)
