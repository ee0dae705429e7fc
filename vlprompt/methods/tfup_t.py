"""TFUP-T: adapters trained with the labels that TFUP gives to unlabelled images (Long et al., 2024; arXiv 2404.16339).

The official code keeps the epoch that is best on the test images; here the last one is kept unless ``select_on`` says
otherwise. Features are frozen, so that training runs on those of random views that are computed once.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlprompt.caches import Adaptation, CacheRecipe, TFUPTrained
from vlprompt.config.types import Count, Fraction, NonNegative, Positive, validated
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register
from vlprompt.methods.tfup import TFUPMethod, TFUPSettings


@validated("settings")
class TFUPTSettings(TFUPSettings):
    """Settings of TFUP-T: those of :class:`TFUPSettings`, and how adapters are trained; official defaults.

    Attributes:
        text_ratio: Share of the text residual in the text classifier.
        image_ratio: Share of the image adapter in the image features.
        warmup_epochs: Epochs on the images that TFUP is sure of; the rest is on all images.
        warmup_fraction: How many images those are, of all; 0.5 for VisDA and two domains of Office-31.
        confidence: Probability above which a label of the second stage counts.
        marginal_weight: Weight of the term that spreads a batch over the classes.
        use_cache: Add the cache to the logits after training, too.
        epochs: All epochs.
        views: Random views of each image: epoch e sees view e modulo this number. As many as epochs is the official
            rule, a new view in each; 0 trains on the test view.
        batch_size: Images per step.
        lr: Learning rate of AdamW at the first step; 0.05 for Office-31.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay.
        select_on: Which epoch is kept: the last, the best on validation images (that takes labels), or, as published,
            the best on the test images. Results then say so.
    """

    text_ratio: Fraction = 0.5
    image_ratio: Fraction = 0.2
    warmup_epochs: Count = 5
    warmup_fraction: NonNegative = 0.75
    confidence: Fraction = 0.9
    marginal_weight: NonNegative = 0.3
    use_cache: bool = False
    epochs: Count = 30
    views: Count = 30
    batch_size: Positive = 256
    lr: NonNegative = 0.012
    eps: NonNegative = 0.003
    weight_decay: NonNegative = 0.1
    select_on: Literal["last", "val", "test"] = "last"


@register("tfup_t")
class TFUPTMethod(TFUPMethod):
    """A text residual and an image adapter beside the cache."""

    Settings = TFUPTSettings
    settings: TFUPTSettings
    cache: TFUPTrained

    def make_cache(self, text: Tensor, scale: Tensor) -> TFUPTrained:
        """Return the empty cache without adapters."""
        own = self.settings
        return TFUPTrained(
            text,
            scale,
            alpha=own.alpha,
            beta=own.beta,
            temperature=own.temperature,
            shots=own.cache_shots,
            recipe=CacheRecipe(own.epochs, own.batch_size, own.lr, own.eps, own.weight_decay),
            adaptation=Adaptation(
                own.text_ratio,
                own.image_ratio,
                own.warmup_epochs,
                own.warmup_fraction,
                own.confidence,
                own.marginal_weight,
                own.use_cache,
            ),
        )

    def unlabelled_view_count(self) -> int:
        """Return how many random views of the unlabelled images are trained on."""
        return self.settings.views

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache and train the adapters."""
        chosen = self.settings.select_on != "last" and len(shots.val_labels) > 0
        val = (shots.val, shots.val_labels) if chosen else None
        self.cache.fit(shots.unlabelled, views=shots.unlabelled_views, val=val, seed=shots.seed)
