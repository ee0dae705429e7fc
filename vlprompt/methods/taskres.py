"""TaskRes: a learned residual on each class's text feature (Yu et al., CVPR 2023; arXiv 2211.10277).

The classifier is ``normalise(t + alpha x)``: t are the frozen raw text features, x starts at zero and is trained by
cross-entropy. Both towers are frozen; training uses image features that are computed once. Official code:
geekyutao/TaskRes, the regular base; on ImageNet its t is a mean over eight prompts. It leaves underscores in class
names (trainers/taskres.py), which are spaces here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vlprompt.caches.residual import TaskResidual, TaskResidualSettings
from vlprompt.config.types import Count, OpenTemplates, validated
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import register
from vlprompt.needs import Needs
from vlprompt.prompts.zero_shot import raw_template_features


@validated("settings")
class TaskResSettings(TaskResidualSettings):
    """Settings of TaskRes; the defaults are the official ones at 8 and 16 shots.

    Attributes:
        templates: The hand-written prompts, as in ``zeroshot``; default: the template of the data set.
        alpha: Weight of the residual (1 for Oxford Flowers); 0 is zero-shot.
        views: Random views of each training image: epoch e uses view e modulo this number. Officially one view per
            epoch; 0 trains on the test view.
        training: Training of the residual (100 epochs at 1, 2 and 4 shots, a rate of 0.0002 on ImageNet).
    """

    templates: OpenTemplates = ()
    views: Count = 20
    renamed: ClassVar[Mapping[str, str]] = {
        "epochs": "training.epochs",
        "batch_size": "training.batch_size",
        "lr": "training.lr",
        "weight_decay": "training.weight_decay",
        "warmup_epochs": "training.warmup_epochs",
    }


@register("taskres")
class TaskRes(FittedMethod):
    """A residual ``[C, D]``, trained on features."""

    checked = "equations"
    Settings = TaskResSettings
    settings: TaskResSettings
    Cache = TaskResidual
    own_draws = ("the order of the training images",)

    @property
    def needs(self) -> Needs:
        """Features of random crops, as in the training of CoOp."""
        return Needs(fit_views=self.settings.views)

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the method's own texts, whose raw features are averaged."""
        return {"templates": self.settings.templates, "average": "raw"}

    def text_weights(self) -> Tensor:
        """Return the mean of the templates' raw features ``[C, D]``."""
        return raw_template_features(self.backbone, self.class_names, self.settings.templates)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the unit text features with residuals ``[C, D]``, which are the whole classifier."""
        text: Tensor = self.cache.adapted_text()
        return text

    def fit(self, shots: FewShotFeatures) -> None:
        """Train the residual and keep that of the last epoch."""
        self.cache.fit(shots.train, shots.labels, seed=shots.seed)
