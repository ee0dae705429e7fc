"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022; arXiv 2207.09519; official code gaopengcuhk/Tip-Adapter).

The keys of Tip-Adapter are the features of the few-shot images, the values their labels. Logits are the zero-shot ones
plus the values, weighted by the affinity of the keys. Tip-Adapter-F trains the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import KeyValueCache, KeyValueSettings
from vlprompt.caches.training import CacheRecipe, TrainingStep, orders
from vlprompt.config.types import NonNegative, validated
from vlprompt.errors import DataError


@validated("settings")
class TipAdapterCacheSettings(KeyValueSettings):
    """Settings of Tip-Adapter; the defaults are the official ones for ImageNet.

    Attributes:
        alpha: Weight of the cache; 0 is zero-shot.
        beta: Sharpness of the affinities.
    """

    alpha: NonNegative = 1.17


class TipAdapter(KeyValueCache):
    """The training-free cache: ``logits = scale f W^T + alpha exp(-beta (1 - f F^T)) V`` (equation 6)."""

    Settings = TipAdapterCacheSettings

    def fit(self, features: Tensor, labels: Tensor) -> TipAdapter:
        """Make a key of each image: the mean of its raw features over the views, normalised.

        Args:
            features: Raw features ``[N, D]``, or of several random views ``[V, N, D]`` (officially 10).
            labels: ``[N]``. A class without images keeps its zero-shot logits.

        Raises:
            DataError: Shapes that do not match, or labels out of range.
        """
        views, labels = self._checked(features, labels)
        order = labels.argsort(stable=True)
        self._set(keys=F.normalize(views.mean(dim=0), dim=-1)[order], labels=labels[order])
        return self


@validated("settings")
class TipAdapterFCacheSettings(TipAdapterCacheSettings):
    """Settings of Tip-Adapter-F; the defaults are the official ones.

    Attributes:
        alpha: Weight of the cache; fixed while keys are trained.
        beta: Sharpness of the affinities; fixed while keys are trained.
        training: Training of the keys (100 epochs on EuroSAT).
    """

    training: CacheRecipe = CacheRecipe(epochs=20, batch_size=256, lr=1e-3, eps=1e-4, weight_decay=0.01)


class TipAdapterF(TipAdapter):
    """The cache of :class:`TipAdapter` with keys that are trained by cross-entropy."""

    Settings = TipAdapterFCacheSettings

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
            features: Raw features ``[N, D]`` or ``[V, N, D]`` that the initial keys are made of.
            labels: ``[N]``.
            epoch_features: Raw features ``[E, N, D]`` of further random views: epoch e trains on view e mod E. The
                official code draws new views in every epoch, which E = epochs reproduces. Default: ``features``.
            val: Raw features ``[M, D]`` and labels ``[M]``. The keys of the best epoch on them are kept, the first of
                equally good ones. Default: those of the last epoch. (The official code keeps the best epoch on the
                test images.)
            seed: Seed of the order of the images.

        Raises:
            DataError: As :meth:`TipAdapter.fit`.
        """
        views, labels = self._checked(features, labels)
        super().fit(views, labels)
        best, kept = -1.0, self.get_buffer("keys")
        given = orders(len(labels), self.settings.training.epochs, seed)
        for step in self.training_steps(views if epoch_features is None else epoch_features, labels, given):
            if not step.ends_epoch:
                continue
            accuracy = self.score(*val) if val is not None and len(val[1]) else float(step.epoch)
            if accuracy > best:
                best, kept = accuracy, self.get_buffer("keys").clone()
        self._set(keys=kept)
        return self

    def training_steps(self, epoch_features: Tensor, labels: Tensor, order: Sequence[Tensor]) -> Iterator[TrainingStep]:
        """Train the keys in place, step by step; yield a description of each step once it is done.

        Args:
            epoch_features: Raw features ``[E, N, D]``; epoch e uses view e mod E.
            labels: ``[N]``.
            order: The order ``[N]`` of the images in each epoch.

        Raises:
            DataError: No keys to train.
        """
        views, labels = self._checked(epoch_features, labels)
        if not self.is_fitted:
            raise DataError("there are no keys to train; fit the cache on at least one image")
        return self._train("keys", self.settings.training, views, labels, order, self._scored_by)

    def _scored_by(self, unit: Tensor, keys: Tensor) -> Tensor:
        return self.combine(self.zeroshot(unit), keys @ unit.t())
