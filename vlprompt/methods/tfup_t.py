"""TFUP-T: adapters trained with the labels that TFUP gives to unlabelled images (Long et al., 2024; arXiv 2404.16339).

The official code keeps the best epoch on the test images; here the last epoch is kept by default (``select_on``).
Features are frozen, so training uses features of random views that are computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from vlprompt.caches.tfup_trained import TFUPTrained, TFUPTrainedSettings
from vlprompt.config.types import Count, validated
from vlprompt.methods.fitted import FewShotFeatures
from vlprompt.methods.registry import register
from vlprompt.methods.tfup import TFUPMethod, TFUPSettings
from vlprompt.needs import Needs


@validated("settings")
class TFUPTSettings(TFUPSettings, TFUPTrainedSettings):
    """Settings of TFUP-T: those of :class:`TFUPSettings`, and those of the adapters; official defaults.

    Attributes:
        training: Training of the adapters; ``epochs`` counts both stages.
        adaptation: The adapters and the two stages.
        views: Random views of each image: epoch e uses view e modulo this number. Officially one view per epoch; 0
            trains on the test view.
        select_on: Epoch to keep: the last, the best on validation images (which requires labels), or, as published,
            the best on the test images, which marks the results.
    """

    views: Count = 30
    select_on: Literal["last", "val", "test"] = "last"
    renamed: ClassVar[Mapping[str, str]] = {
        "epochs": "training.epochs",
        "batch_size": "training.batch_size",
        "lr": "training.lr",
        "eps": "training.eps",
        "weight_decay": "training.weight_decay",
        "text_ratio": "adaptation.text_ratio",
        "image_ratio": "adaptation.image_ratio",
        "warmup_epochs": "adaptation.warmup_epochs",
        "warmup_fraction": "adaptation.warmup_fraction",
        "confidence": "adaptation.confidence",
        "marginal_weight": "adaptation.marginal_weight",
        "use_cache": "adaptation.use_cache",
    }


@register("tfup_t")
class TFUPTMethod(TFUPMethod):
    """A text residual and an image adapter in addition to the cache."""

    Settings = TFUPTSettings
    settings: TFUPTSettings
    Cache = TFUPTrained
    own_draws = ("the initial adapters", "the order of the images")

    @property
    def needs(self) -> Needs:
        """Features of random views of unlabelled images."""
        settings = self.settings
        chosen = None if settings.select_on == "last" else settings.select_on
        return dataclasses.replace(super().needs, unlabelled_views=settings.views, select_on=chosen)

    def fit(self, shots: FewShotFeatures) -> None:
        """Fill the cache and train the adapters."""
        chosen = self.settings.select_on != "last" and len(shots.val_labels) > 0
        val = (shots.val, shots.val_labels) if chosen else None
        self.cache.fit(shots.unlabelled, views=shots.unlabelled_views, val=val, seed=shots.seed)
