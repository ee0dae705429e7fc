"""Task residual: a learned offset to each class's text feature (TaskRes: Yu et al., CVPR 2023; arXiv 2211.10277).

The official code (geekyutao/TaskRes) adds it to the raw text feature, the mean over the templates, whose length so
decides how far a step goes; their sum is brought to length 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import RowClassifier
from vlprompt.caches.training import EpochRecipe, TrainingStep, orders

#: The official recipe at 8 and 16 shots; at fewer 100 epochs, on ImageNet a tenth of the rate.
TASKRES_RECIPE = EpochRecipe(epochs=200, batch_size=256, lr=2e-3)


class TaskResidual(RowClassifier):
    """``logits = scale f normalise(t + alpha x)^T``: x ``[C, D]`` is learned and starts at zero.

    Args:
        text_features: Raw text features t ``[C, D]``.
        logit_scale: What cosines are multiplied by.
        alpha: Weight of the residual; 0 is zero-shot.
        recipe: Epochs, batch size, learning rate.
    """

    fitted = ("residual",)
    per_class = ("residual",)

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float | Tensor = 100.0,
        *,
        alpha: float = 0.5,
        recipe: EpochRecipe = TASKRES_RECIPE,
    ) -> None:
        super().__init__(text_features, logit_scale)
        self._keep("raw_text", text_features)
        self._keep("residual", text_features.new_zeros(0, text_features.shape[1]))
        self.alpha, self.recipe = alpha, recipe

    def adapted_text(self) -> Tensor:
        """Return the unit text classifier ``[C, D]`` with its residual; the zero-shot one before :meth:`fit`."""
        return self._adapted(self.get_buffer("residual")) if self.is_fitted else self.text

    def _adapted(self, residual: Tensor) -> Tensor:
        return F.normalize(self.get_buffer("raw_text") + self.alpha * residual, dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of raw ``features`` ``[B, D]``; zero-shot before :meth:`fit`."""
        return self.get_buffer("logit_scale") * self.unit(features) @ self.adapted_text().t()

    def fit(self, features: Tensor, labels: Tensor, *, seed: int = 1) -> TaskResidual:
        """Train the residual by cross-entropy, from zero.

        Args:
            features: Raw features ``[N, D]``, or of several random views ``[E, N, D]``: epoch e trains on view e mod E.
                The official code draws new views in every epoch; E = epochs is exactly that.
            labels: ``[N]``.
            seed: Of the orders of the images.

        Raises:
            DataError: Shapes that do not go together, or labels that are none of the classes.
        """
        views, labels = self._checked(features, labels)
        self._set(residual=self.text.new_zeros(self.text.shape))
        for _ in self.training_steps(views, labels, orders(len(labels), self.recipe.epochs, seed)):
            pass
        return self

    def training_steps(self, features: Tensor, labels: Tensor, order: Sequence[Tensor]) -> Iterator[TrainingStep]:
        """Train the residual in place, step by step; what is yielded describes the step that was just taken.

        Args:
            features: Raw features ``[E, N, D]``, as in :meth:`fit`.
            labels: ``[N]``.
            order: The order ``[N]`` of the images in each epoch.
        """

        def scored(unit: Tensor, residual: Tensor) -> Tensor:
            return self.get_buffer("logit_scale") * unit @ self._adapted(residual).t()

        return self._train("residual", self.recipe, *self._checked(features, labels), order, scored)


__all__ = ["TASKRES_RECIPE", "TaskResidual"]
