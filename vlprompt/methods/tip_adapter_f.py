"""Tip-Adapter-F: Tip-Adapter whose keys are trained by cross-entropy (ECCV 2022; arXiv 2207.09519, section 3.2).

Image features are frozen, so training uses features of random views that are computed once. The official code keeps the
best epoch on the test images and then searches; here validation images are used by default (``select_on``). Without
validation images the last epoch is kept and nothing is searched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vlprompt.caches.tip_adapter import TipAdapterF, TipAdapterFCacheSettings
from vlprompt.config.types import Count, validated
from vlprompt.methods.fitted import FewShotFeatures, keys_of
from vlprompt.methods.registry import register
from vlprompt.methods.tip_adapter import TipAdapterMethod, TipAdapterSettings
from vlprompt.needs import Needs


@validated("settings")
class TipAdapterFSettings(TipAdapterSettings, TipAdapterFCacheSettings):
    """Settings of Tip-Adapter-F: those of :class:`TipAdapterSettings`, and those of the training.

    Attributes:
        training: Training of the keys.
        epoch_views: Further random views for training: epoch e uses view e modulo this number. Officially one
            view per epoch; 0 trains on the views of the keys.
    """

    epoch_views: Count = 20
    renamed: ClassVar[Mapping[str, str]] = {
        "epochs": "training.epochs",
        "batch_size": "training.batch_size",
        "lr": "training.lr",
        "eps": "training.eps",
        "weight_decay": "training.weight_decay",
    }

    def searched(self) -> dict[str, str]:
        """Return nothing: the training of the keys uses alpha and beta, before the search."""
        return {}


@register("tip_adapter_f")
class TipAdapterFMethod(TipAdapterMethod):
    """A trained key for each few-shot image."""

    Settings = TipAdapterFSettings
    settings: TipAdapterFSettings
    Cache = TipAdapterF
    own_draws = ("the order of the training images",)

    @property
    def needs(self) -> Needs:
        """Features of random views of the training images: for their keys, then for training."""
        settings = self.settings
        views = (settings.views or 1) + settings.epoch_views if settings.views or settings.epoch_views else 0
        return dataclasses.replace(super().needs, fit_views=views)

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache, train its keys, then search alpha and beta."""
        keys, rest = keys_of(shots, self.settings.views)
        val = (shots.val, shots.val_labels) if len(shots.val_labels) else None
        self.cache.fit(keys, shots.labels, epoch_features=rest, val=val, seed=shots.seed)
        self.search(shots)
