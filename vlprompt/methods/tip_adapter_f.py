"""Tip-Adapter-F: Tip-Adapter whose keys are trained by cross-entropy (ECCV 2022; arXiv 2207.09519, section 3.2).

Image features are frozen, so that training runs on features of random views that are computed once. The official code
keeps the epoch that is best on the test images and searches afterwards; here validation images decide unless
``select_on`` says otherwise. Without validation images the last epoch is kept and nothing is searched.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.caches import CacheRecipe, TipAdapterF
from vlprompt.config.types import Count, NonNegative, Positive, validated
from vlprompt.methods.cached import keys_of
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register
from vlprompt.methods.tip_adapter import TipAdapterMethod, TipAdapterSettings


@validated("settings")
class TipAdapterFSettings(TipAdapterSettings):
    """Settings of Tip-Adapter-F: those of :class:`TipAdapterSettings`, and how keys are trained.

    Attributes:
        epochs: Passes over the few-shot images.
        epoch_views: Further random views for training: epoch e sees view e modulo this number. As many as epochs is
            the official rule, a new view in each; 0 trains on the views that the keys are made of.
        batch_size: Images per step.
        lr: Learning rate of AdamW at the first step; it falls to zero along a cosine.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay.
    """

    epochs: Count = 20
    epoch_views: Count = 20
    batch_size: Positive = 256
    lr: NonNegative = 1e-3
    eps: NonNegative = 1e-4
    weight_decay: NonNegative = 0.01


@register("tip_adapter_f")
class TipAdapterFMethod(TipAdapterMethod):
    """A trained key for each few-shot image."""

    Settings = TipAdapterFSettings
    settings: TipAdapterFSettings
    cache: TipAdapterF

    def make_cache(self, text: Tensor, scale: Tensor) -> TipAdapterF:
        """Return the empty cache."""
        own = self.settings
        recipe = CacheRecipe(own.epochs, own.batch_size, own.lr, own.eps, own.weight_decay)
        return TipAdapterF(text, scale, alpha=own.alpha, beta=own.beta, recipe=recipe)

    def fit_views(self) -> int:
        """Return how many random views of each training image are used: for its key, then for training."""
        own = self.settings
        return (own.views or 1) + own.epoch_views if own.views or own.epoch_views else 0

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache, train its keys, then search alpha and beta."""
        keys, rest = keys_of(shots, self.settings.views)
        val = (shots.val, shots.val_labels) if len(shots.val_labels) else None
        self.cache.fit(keys, shots.labels, epoch_features=rest, val=val, seed=shots.seed)
        self.search(shots)
