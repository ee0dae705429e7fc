"""TaskRes: a learned residual on each class's text feature (Yu et al., CVPR 2023; arXiv 2211.10277).

The classifier is ``normalise(t + alpha x)``: t are the frozen raw text features, x starts at zero and is
trained by cross-entropy. Neither tower takes part in training, which runs on image features that are computed once.
Official code: geekyutao/TaskRes, the regular base; on ImageNet its t is a mean over eight prompts.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.caches import EpochRecipe, TaskResidual
from vlprompt.config.types import Count, NonNegative, OpenTemplates, Positive, validated
from vlprompt.methods.cached import CachedMethod
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.registry import register
from vlprompt.prompts.zero_shot import raw_template_features


@validated("settings")
class TaskResSettings:
    """Settings of TaskRes; the defaults are the official ones at 8 and 16 shots.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; left open, the data set's own.
        alpha: Weight of the residual (1 for Oxford Flowers); 0 is zero-shot.
        views: Random views of each training image: epoch e sees view e modulo this number. As many as epochs is the
            official rule, a new view in each; 0 trains on the test view.
        epochs: Passes over the few-shot images (100 at 1, 2 and 4 shots).
        batch_size: Images per step.
        lr: Adam's learning rate after the warm-up, at the top of the cosine (0.0002 on ImageNet).
        weight_decay: Adam's weight decay.
        warmup_epochs: Epochs before that, at the rate 1e-5.
    """

    templates: OpenTemplates = ()
    alpha: NonNegative = 0.5
    views: Count = 20
    epochs: Count = 200
    batch_size: Positive = 256
    lr: NonNegative = 2e-3
    weight_decay: NonNegative = 5e-4
    warmup_epochs: Count = 1


@register("taskres")
class TaskRes(CachedMethod):
    """A residual ``[C, D]``, trained on features."""

    checked = "equations"
    Settings = TaskResSettings
    fit_view = "random"
    settings: TaskResSettings
    cache: TaskResidual

    def text_weights(self) -> Tensor:
        """Return the mean of the templates' raw features ``[C, D]``."""
        return raw_template_features(self.backbone, self.class_names, self.settings.templates)

    def make_cache(self, text: Tensor, scale: Tensor) -> TaskResidual:
        """Return the classifier without a residual."""
        own = self.settings
        recipe = EpochRecipe(
            own.epochs, own.batch_size, own.lr, weight_decay=own.weight_decay, warmup_epochs=own.warmup_epochs
        )
        return TaskResidual(text, scale, alpha=own.alpha, recipe=recipe)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features with their residuals ``[C, D]``: these are the whole classifier."""
        return self.cache.adapted_text()

    def fit(self, shots: FewShotFeatures) -> None:
        """Train the residual; the last epoch's is kept."""
        self.cache.fit(shots.train, shots.labels, seed=shots.seed)
