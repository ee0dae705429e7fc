"""Tip-Adapter: the few-shot images' features as a key-value cache beside zero-shot CLIP (ECCV 2022; arXiv 2207.09519).

No training: an image's logits are the zero-shot ones plus ``alpha exp(-beta (1 - f F^T)) V`` (equation 6), where F are
the features of the few-shot images, each the mean over random views, and V their labels. ``alpha`` and ``beta`` are
searched on validation images (official code: gaopengcuhk/Tip-Adapter, which on ImageNet searches on the test images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprompt.caches import TipAdapter, grid
from vlprompt.config.settings import check_settings
from vlprompt.errors import ConfigError
from vlprompt.methods.cached import CachedMethod, keys_of
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register
from vlprompt.prompts import check_templates


@dataclass(frozen=True)
class TipAdapterSettings:
    """Settings of Tip-Adapter; the defaults are the official ones for ImageNet.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; left open, the data set's own.
        alpha: Weight of the cache, where nothing is searched or there are no validation images.
        beta: Sharpness of the affinities, likewise.
        views: Random views averaged into the key of each image; 0 takes the test view.
        search: Search alpha and beta on the images that ``select_on`` names.
        search_alpha: Upper end of the searched alphas; the lower one is 0.1.
        search_beta: Upper end of the searched betas; the lower one is 0.1.
        search_steps: How many betas, and how many alphas.
        select_on: Images that the search is on: val, or, as published for ImageNet, test. Results then say so.
    """

    templates: Sequence[str] = ("a photo of a {}.",)
    alpha: float = 1.17
    beta: float = 1.0
    views: int = 10
    search: bool = True
    search_alpha: float = 3.0
    search_beta: float = 7.0
    search_steps: Sequence[int] = (200, 20)
    select_on: Literal["val", "test"] = "val"

    def __post_init__(self) -> None:
        check_templates(self.templates, "settings.templates")
        check_settings(self, alpha=0, beta=0, views=0, search_alpha=0.1, search_beta=0.1)
        if len(self.search_steps) != 2 or min(self.search_steps) < 1:
            raise ConfigError(f"settings.search_steps is {list(self.search_steps)}; accepted: two numbers, 1 or more")


@register("tip_adapter")
class TipAdapterMethod(CachedMethod):
    """A key for each few-shot image; nothing is trained."""

    Settings = TipAdapterSettings
    settings: TipAdapterSettings
    cache: TipAdapter

    def make_cache(self, text: Tensor, scale: Tensor) -> TipAdapter:
        """Return the empty cache."""
        return TipAdapter(text, scale, alpha=self.settings.alpha, beta=self.settings.beta)

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache and search alpha and beta."""
        self.cache.fit(keys_of(shots, self.fit_views())[0], shots.labels)
        self.search(shots)

    def search(self, shots: FewShotFeatures) -> None:
        """Set alpha and beta to the best on the validation images, where there are any."""
        own = self.settings
        if own.search and len(shots.val_labels):
            betas, alphas = (
                grid(top, steps)
                for top, steps in zip((own.search_beta, own.search_alpha), own.search_steps, strict=True)
            )
            self.cache.search(shots.val, shots.val_labels, betas, alphas)
