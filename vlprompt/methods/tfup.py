"""TFUP: a cache of unlabelled images that zero-shot CLIP is sure of (Long et al., 2024; arXiv 2404.16339).

No labels and no training. Published results on Office-31, Office-Home and VisDA select from the test images
(``unlabelled: test``: the result is transductive, and marked), those on DomainNet from training images. Their text
classifiers, except on VisDA, average 30 sentences of a language model a class, which ``templates`` takes as a file.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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
        templates: The hand-written prompts; their raw features are averaged. Default: the template of the data set.
        alpha: Weight of the cache.
        beta: Sharpness of the affinities.
        temperature: Factor of the cosines before the softmax that ranks and compares images.
        cache_shots: Images selected for each class; 0 uses the paper's rule: 0.3 of all images divided by the number of
            classes, 9 to 16 each.
        unlabelled: Images to select from: those of the training split without labels, or of the test split, which makes
            the result transductive.
    """

    templates: OpenTemplates = ()
    unlabelled: Literal["train", "test"] = "train"


@register("tfup")
class TFUPMethod(FittedMethod):
    """Keys selected for each class from unlabelled images."""

    Settings: ClassVar[type] = TFUPSettings
    settings: TFUPSettings
    Cache = TFUP

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own texts, whose raw features are averaged."""
        return {"templates": self.settings.templates, "average": "raw"}

    def text_weights(self) -> Tensor:
        """Return the mean of the templates' raw features ``[C, D]``."""
        return raw_template_features(self.backbone, self.class_names, self.settings.templates)

    @property
    def needs(self) -> Needs:
        """Features of unlabelled images; labelled ones are not used."""
        return Needs(unlabelled=self.settings.unlabelled, fit_labelled=False)

    def fit(self, shots: FewShotFeatures) -> None:
        """Select the images and fill the cache."""
        self.cache.fit(shots.unlabelled)
