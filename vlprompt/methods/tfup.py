"""TFUP: a cache of unlabelled images that zero-shot CLIP is sure of (Long et al., 2024; arXiv 2404.16339).

No labels and no training. Published numbers on Office-31, Office-Home and VisDA choose among the test images
themselves (``unlabelled: test``: the result is transductive and says so), those on DomainNet among training images.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from vlprompt.caches.tfup import TFUP, TFUPCacheSettings
from vlprompt.config.types import OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts.zero_shot import raw_template_features


@validated("settings")
class TFUPSettings(TFUPCacheSettings):
    """Settings of TFUP; the defaults are the official ones.

    Attributes:
        templates: The hand-written prompts; their raw features are averaged. Left open, the data set's own.
        alpha: Weight of the cache.
        beta: Sharpness of the affinities.
        temperature: What cosines are multiplied by before the softmax that ranks and compares images.
        cache_shots: Images that each class chooses; 0 takes the paper's rule: 0.3 of all, shared out among the
            classes, 9 to 16 each.
        unlabelled: Images that are chosen from: those of the training split, without their labels, or of the test
            split, which makes the result transductive.
    """

    templates: OpenTemplates = ()
    unlabelled: Literal["train", "test"] = "train"


@register("tfup")
class TFUPMethod(FittedMethod):
    """Keys that each class chooses among unlabelled images."""

    Settings: ClassVar[type] = TFUPSettings
    settings: TFUPSettings
    Cache = TFUP

    def text_weights(self) -> Tensor:
        """Return the mean of the templates' raw features ``[C, D]``."""
        return raw_template_features(self.backbone, self.class_names, self.settings.templates)

    @property
    def needs(self) -> Needs:
        """Features of unlabelled images; labelled ones are not used."""
        return Needs(unlabelled=self.settings.unlabelled)

    def fit(self, shots: FewShotFeatures) -> None:
        """Choose the images and keep them."""
        self.cache.fit(shots.unlabelled)
