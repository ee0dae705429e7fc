"""APE: a cache on selected channels with weighted values (Zhu et al., ICCV 2023; arXiv 2304.01195).

Official code: yangyangyang127/APE, its training-free variant. The channels kept are those in which classes are least
alike and text features vary most. A key counts more the less sure zero-shot CLIP is of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import KeyValueCache, KeyValueSettings, class_sums
from vlprompt.caches.search import SearchResult, search_grid
from vlprompt.config.types import Count, NonNegative, validated
from vlprompt.errors import ConfigError

_EPS = 1e-6


@validated("settings")
class APECacheSettings(KeyValueSettings):
    """Settings of APE; the defaults are the official ones for ImageNet.

    Attributes:
        alpha: Weight of the cache; 0 is zero-shot.
        beta: Sharpness of the affinities.
        gamma: Weight of the divergence of the values: how much more a key counts that zero-shot CLIP is not sure of.
        channels: Q, the number of channels kept; 0 keeps half of them, rounded up. Published numbers are for 1,024.
        likeness_weight: Weight of the likeness between classes in the score of a channel.
        variance_weight: Weight of the variance of the text features in it.
    """

    alpha: NonNegative = 2.0
    gamma: NonNegative = 0.1
    channels: Count = 0
    likeness_weight: NonNegative = 0.7
    variance_weight: NonNegative = 0.3


class APE(KeyValueCache):
    """``logits = scale f W^T + alpha exp(-beta (1 - f' K'^T)) (V r)``, where primes mark the selected channels.

    Arguments are those of :class:`~vlprompt.caches.base.FeatureClassifier`.

    Raises:
        ConfigError: More channels than the features have.
    """

    Settings = APECacheSettings
    fitted = ("keys", "labels", "channels", "divergence", "alpha", "beta", "gamma")

    def build(self, text_features: Tensor) -> None:
        """Create the fitted buffers."""
        super().build(text_features)
        width = text_features.shape[1]
        self.count = self.settings.channels or (width + 1) // 2
        if self.count > width:
            raise ConfigError(
                f"settings.channels is {self.count}; accepted: 1 to {width}, the backbone's feature size, or 0 for half"
            )
        self._keep("keys", text_features.new_zeros(0, self.count))
        self._keep("channels", text_features.new_zeros(0))
        self._keep("divergence", text_features.new_zeros(0))
        self._keep("gamma", text_features.new_tensor(self.settings.gamma))

    def fit(self, features: Tensor, labels: Tensor) -> APE:
        """Select the channels and make a weighted key of each image.

        Args:
            features: Raw features ``[N, D]``, or of several random views ``[V, N, D]``, which are averaged.
            labels: ``[N]``. Classes without images enter the selection of channels by their text feature.

        Raises:
            DataError: Shapes that do not match, or labels out of range.
        """
        views, labels = self._checked(features, labels)
        order = labels.argsort(stable=True)
        keys, labels = F.normalize(views.mean(dim=0), dim=-1)[order], labels[order]
        chosen = self.channel_scores(keys, labels).topk(self.count).indices.sort().values
        with torch.no_grad():
            text = F.normalize(self.text[:, chosen], dim=-1)
            keys = F.normalize(keys[:, chosen], dim=-1)
            probability = (keys @ text.t()).softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
            # KL of the one-hot value from it, in bits: the other entries of the value are zero and add nothing.
            divergence = torch.log2((1 + _EPS) / (probability + _EPS))
        self._set(keys=keys, labels=labels, channels=chosen, divergence=divergence)
        return self

    def channel_scores(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return the score ``[D]`` of each channel: ``-w1 S_d + w2 Var_c(W_cd)``; the largest are kept.

        S is the mean product of the channel over all pairs of a row of one class and a row of another, where the rows
        of a class are its text feature and its keys. In closed form: the square of the sum over all rows, less the sum
        of the classes' squares, over the number of pairs.

        Args:
            keys: Unit keys ``[N, D]``.
            labels: ``[N]``.
        """
        with torch.no_grad():
            text = self.text.double()
            sums = text + class_sums(keys.double(), labels, self.classes)
            rows = 1 + torch.bincount(labels, minlength=self.classes).double()
            pairs = rows.sum() ** 2 - (rows**2).sum()
            likeness = (sums.sum(dim=0) ** 2 - (sums**2).sum(dim=0)) / pairs.clamp(min=1)
            variance = text.var(dim=0) if self.classes > 1 else torch.zeros_like(likeness)
            scores: Tensor = -self.settings.likeness_weight * likeness + self.settings.variance_weight * variance
        return scores

    def affinity(self, unit: Tensor) -> Tensor:
        """Return the cosine of the chosen channels ``[N, B]`` of each key and unit features ``[B, D]``."""
        chosen = self.get_buffer("channels").long()
        return self.get_buffer("keys") @ F.normalize(unit[:, chosen], dim=-1).t()

    def evidence(self, affinity: Tensor, beta: float | Tensor) -> Tensor:
        """Return the weighted sums over the keys of each class ``[C, B]``; ``affinity`` ``[N, B]``."""
        weights = (self.get_buffer("gamma") * self.get_buffer("divergence")).exp()
        return class_sums((affinity - 1).mul_(beta).exp_() * weights[:, None], self.key_labels, self.classes)

    def search(
        self,
        features: Tensor,
        labels: Tensor,
        betas: Sequence[float],
        alphas: Sequence[float],
        gammas: Sequence[float] = (),
    ) -> SearchResult:
        """Set ``beta``, ``alpha`` and ``gamma`` to the best point of a grid on labelled images; return the search.

        Ties go to the first point; beta is the outermost loop, gamma the innermost. Without ``gammas``, gamma is kept.

        Raises:
            DataError: No images, or labels out of range.
            ConfigError: An empty grid.
        """
        views, labels = self._checked(features, labels)
        tried = list(gammas) or [float(self.get_buffer("gamma"))]
        weights = [(gamma * self.get_buffer("divergence")).exp()[:, None] for gamma in tried]

        def prepare(start: int, stop: int) -> tuple[Tensor, Tensor]:
            unit = self.unit(views[0, start:stop])
            return self.zeroshot(unit), self.affinity(unit)

        def evidences(affinity: Tensor, beta: float) -> list[Tensor]:
            sharp = (affinity - 1).mul_(beta).exp_()
            return [class_sums(sharp * weight, self.key_labels, self.classes) for weight in weights]

        search = search_grid(labels, prepare, evidences, {"beta": betas, "alpha": alphas, "gamma": tried})
        self._set(**search.values)
        return search

    def _per_key(self) -> tuple[str, ...]:
        return ("keys", "divergence")

    def _key_width(self, state: Mapping[str, Tensor]) -> int:
        return len(state["channels"]) or self.count

    def misfits(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return what in a ``state`` of fitted buffers contradicts itself or the classes, in words."""
        channels, width = state["channels"], self.text.shape[1]
        inside = bool(((channels >= 0) & (channels < width)).all())
        return super().misfits(state) + ([] if inside else [f"channels: not all of them are 0 to {width - 1}"])
