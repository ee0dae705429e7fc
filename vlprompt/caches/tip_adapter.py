"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022; arXiv 2207.09519; official code gaopengcuhk/Tip-Adapter).

Tip-Adapter keeps the features of the few-shot images as keys and their labels as values; an image's logits are the
zero-shot ones plus the values, weighted by how near the keys are. Tip-Adapter-F trains the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import KeyValueCache
from vlprompt.caches.training import CacheRecipe, TrainingStep, orders
from vlprompt.errors import DataError

#: The official recipe of Tip-Adapter-F; EuroSAT has 100 epochs.
TIP_ADAPTER_F_RECIPE = CacheRecipe(epochs=20, batch_size=256, lr=1e-3, eps=1e-4, weight_decay=0.01)


class TipAdapter(KeyValueCache):
    """The training-free cache: ``logits = scale f W^T + alpha exp(-beta (1 - f F^T)) V`` (equation 6)."""

    def fit(self, features: Tensor, labels: Tensor) -> TipAdapter:
        """Make a key of each image: the mean of its raw features over the views, then brought to length 1.

        Args:
            features: Raw features ``[N, D]``, or of several random views ``[V, N, D]`` (officially 10).
            labels: ``[N]``. A class without images keeps its zero-shot logits.

        Raises:
            DataError: Shapes that do not go together, or labels that are none of the classes.
        """
        views, labels = self._checked(features, labels)
        order = labels.argsort(stable=True)
        self._set(keys=F.normalize(views.mean(dim=0), dim=-1)[order], labels=labels[order])
        return self


class TipAdapterF(TipAdapter):
    """The cache whose keys are trained by cross-entropy, from those of :class:`TipAdapter`.

    Args:
        text_features: As in :class:`TipAdapter`.
        logit_scale: As there.
        alpha: As there; fixed while keys are trained.
        beta: As there; fixed while keys are trained.
        recipe: Epochs, batch size, learning rate.
    """

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float | Tensor = 100.0,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        recipe: CacheRecipe = TIP_ADAPTER_F_RECIPE,
    ) -> None:
        super().__init__(text_features, logit_scale, alpha=alpha, beta=beta)
        self.recipe = recipe

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        epoch_features: Tensor | None = None,
        val: tuple[Tensor, Tensor] | None = None,
        seed: int = 1,
    ) -> TipAdapterF:
        """Make the keys and train them.

        Args:
            features: Raw features ``[N, D]`` or ``[V, N, D]``, of which the first keys are made.
            labels: ``[N]``.
            epoch_features: Raw features ``[E, N, D]`` of further random views: epoch e trains on view e mod E. The
                official code draws new views in every epoch; E = epochs is exactly that. Default: ``features``.
            val: Raw features ``[M, D]`` and labels ``[M]``: the keys of the best epoch there are kept, of equally good
                epochs the first. Default: those of the last epoch. (The official code keeps the best epoch on the test
                images.)
            seed: Of the orders of the images.

        Raises:
            DataError: As :meth:`TipAdapter.fit`.
        """
        views, labels = self._checked(features, labels)
        super().fit(views, labels)
        best, kept = -1.0, self.get_buffer("keys")
        given = orders(len(labels), self.recipe.epochs, seed)
        for step in self.training_steps(views if epoch_features is None else epoch_features, labels, given):
            if not step.ends_epoch:
                continue
            accuracy = self.score(*val) if val is not None and len(val[1]) else float(step.epoch)
            if accuracy > best:
                best, kept = accuracy, self.get_buffer("keys").clone()
        self._set(keys=kept)
        return self

    def training_steps(self, epoch_features: Tensor, labels: Tensor, order: Sequence[Tensor]) -> Iterator[TrainingStep]:
        """Train the keys in place, step by step; what is yielded describes the step that was just taken.

        Args:
            epoch_features: Raw features ``[E, N, D]``; epoch e uses view e mod E.
            labels: ``[N]``.
            order: The order ``[N]`` of the images in each epoch.

        Raises:
            DataError: There are no keys to train.
        """
        views, labels = self._checked(epoch_features, labels)
        if not self.is_fitted:
            raise DataError("there are no keys to train; fit the cache on at least one image")
        return self._train("keys", self.recipe, views, labels, order, self._scored_by)

    def _scored_by(self, unit: Tensor, keys: Tensor) -> Tensor:
        return self.combine(self.zeroshot(unit), keys @ unit.t())


__all__ = ["TIP_ADAPTER_F_RECIPE", "TipAdapter", "TipAdapterF"]
