"""Task residual: a learned offset to the text feature of each class (TaskRes; Yu et al., CVPR 2023; arXiv 2211.10277).

The official code (geekyutao/TaskRes) adds it to the raw text feature, the mean over the templates, and normalises the
sum. The length of the raw feature thus sets the effect of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import RowClassifier
from vlprompt.caches.training import EpochRecipe, TrainingStep, orders
from vlprompt.config.types import NonNegative, validated


@validated("settings")
class TaskResidualSettings:
    """Settings of the residual; the defaults are the official ones at 8 and 16 shots.

    Attributes:
        alpha: Weight of the residual (1 for Oxford Flowers); 0 is zero-shot.
        training: Training of the residual (100 epochs at 1, 2 and 4 shots, a rate of 0.0002 on ImageNet).
    """

    alpha: NonNegative = 0.5
    training: EpochRecipe = EpochRecipe(epochs=200, batch_size=256, lr=2e-3)


class TaskResidual(RowClassifier):
    """``logits = scale f normalise(t + alpha x)^T``: x ``[C, D]`` is learned and starts at zero.

    Arguments are those of :class:`~vlprompt.caches.base.FeatureClassifier`; ``text_features`` are the raw ones.
    """

    Settings = TaskResidualSettings
    fitted = ("residual",)
    per_class = ("residual",)

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        self._keep("raw_text", text_features)
        self._keep("residual", text_features.new_zeros(0, text_features.shape[1]))

    def adapted_text(self) -> Tensor:
        """Return the unit text classifier ``[C, D]`` with its residual; the zero-shot one before :meth:`fit`."""
        return self._adapted(self.get_buffer("residual")) if self.is_fitted else self.text

    def _adapted(self, residual: Tensor) -> Tensor:
        return F.normalize(self.get_buffer("raw_text") + self.settings.alpha * residual, dim=-1)

    def _scored(self, features: Tensor) -> Tensor:
        return self.get_buffer("logit_scale") * self.unit(features) @ self.adapted_text().t()

    def fit(self, features: Tensor, labels: Tensor, *, seed: int = 1) -> TaskResidual:
        """Train the residual by cross-entropy, from zero.

        Args:
            features: Raw features ``[N, D]``, or of several random views ``[E, N, D]``: epoch e trains on view e mod E.
                The official code draws new views in every epoch, which E = epochs reproduces.
            labels: ``[N]``.
            seed: Seed of the order of the images.

        Raises:
            DataError: Shapes that do not match, or labels out of range.
        """
        views, labels = self._checked(features, labels)
        self._set(residual=self.text.new_zeros(self.text.shape))
        for _ in self.training_steps(views, labels, orders(len(labels), self.settings.training.epochs, seed)):
            pass
        return self

    def training_steps(self, features: Tensor, labels: Tensor, order: Sequence[Tensor]) -> Iterator[TrainingStep]:
        """Train the residual in place, step by step; yield a description of each step once it is done.

        Args:
            features: Raw features ``[E, N, D]``, as in :meth:`fit`.
            labels: ``[N]``.
            order: The order ``[N]`` of the images in each epoch.
        """

        def scored(unit: Tensor, residual: Tensor) -> Tensor:
            return self.get_buffer("logit_scale") * unit @ self._adapted(residual).t()

        return self._train("residual", self.settings.training, *self._checked(features, labels), order, scored)
