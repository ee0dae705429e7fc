"""TFUP: a cache of unlabelled images of the target domain (Long et al., 2024; arXiv 2404.16339).

Each class selects images by the confidence of zero-shot CLIP and by their distance to other confident images, and
labels them. The affinity of a key is the cosine of the features times the likeness of the class probabilities.
Official code: wlb12345/TFUP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import KeyValueCache, KeyValueSettings
from vlprompt.config.types import Count, NonNegative, validated
from vlprompt.errors import DataError


@validated("settings")
class TFUPCacheSettings(KeyValueSettings):
    """Settings of TFUP; the defaults are the official ones.

    Attributes:
        alpha: Weight of the cache; 0 is zero-shot.
        beta: Sharpness of the affinities.
        temperature: Factor of the cosines before the softmax that ranks and compares images.
        cache_shots: Images selected by each class; 0 follows the paper: 0.3 of all, shared among the classes, 9 to 16
            each.
    """

    alpha: NonNegative = 0.3
    temperature: NonNegative = 10.0
    cache_shots: Count = 0


class TFUP(KeyValueCache):
    """The training-free cache: ``logits = scale f W^T + alpha exp(-beta (1 - A)) V`` with ``A = (f . k) S``.

    S, between 0 and 2, falls with the divergence of the class probabilities of image and key, so A may exceed 1.
    Arguments are those of :class:`~vlprompt.caches.base.FeatureClassifier`.
    """

    Settings = TFUPCacheSettings

    def fit(self, features: Tensor, labels: Tensor | None = None) -> TFUP:
        """Select the images of each class and keep them.

        Args:
            features: Raw features ``[U, D]`` of unlabelled images. One image may be selected by several classes.
            labels: Ignored, as in scikit-learn's unsupervised estimators.

        Raises:
            DataError: No images, or features of another size.
        """
        chosen = self.select(features, self.settings.cache_shots or cache_shots(len(features), self.classes))
        labels = torch.arange(self.classes, device=chosen.device).repeat_interleave(chosen.shape[1])
        self._set(keys=self.unit(features[chosen.flatten()]), labels=labels)
        return self

    def probabilities(self, unit: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the logarithms of the class probabilities ``[B, C]`` of unit features ``[B, D]``.

        ``text``: unit rows ``[C, D]`` of another text classifier than the frozen one.
        """
        text = self.text if text is None else text
        logits: Tensor = self.settings.temperature * unit @ text.t()
        return logits.log_softmax(dim=-1)

    def select(self, features: Tensor, shots: int) -> Tensor:
        """Return the images ``[C, K]`` that each class selects, the most central first; K is ``shots``, or all images.

        Of the 2K images with the largest probability of the class (whatever their most probable class), the K with the
        least total divergence from the 2K are kept.

        Args:
            features: Raw features ``[U, D]``.
            shots: K.

        Raises:
            DataError: No images, or features of another size.
        """
        if features.ndim != 2 or features.shape[1] != self.text.shape[1] or not len(features):
            raise DataError(
                f"features of unlabelled images have shape {list(features.shape)}; accepted: 1 or more images "
                f"[U, D] with D = {self.text.shape[1]}"
            )
        with torch.no_grad():
            log = self.probabilities(self.unit(features))
            likely = log.topk(min(2 * shots, len(log)), dim=0).indices.t()
            # Class by class: all at once would hold 2K C^2 numbers.
            central = [candidate_divergence(log[rows]).argsort(stable=True)[:shots] for rows in likely]
            return likely.gather(1, torch.stack(central))

    def similarity(self, log: Tensor, key_log: Tensor) -> Tensor:
        """Return S ``[N, B]``: the divergences of an image's probabilities from those of the keys, mapped to 2 to 0.

        2 for the nearest key, 0 for the farthest; 2 for all keys at equal distance. (The published code also
        standardises the row before, which minimum and maximum cancel.)

        Args:
            log: Logarithms of the probabilities of images ``[B, C]``.
            key_log: Those of keys ``[N, C]``.
        """
        divergence = kl_matrix(log, key_log).t()
        low = divergence.amin(dim=0, keepdim=True)
        span = divergence.amax(dim=0, keepdim=True) - low
        return 2 * (1 - (divergence - low) / torch.where(span > 0, span, torch.ones_like(span)))

    def affinity(self, unit: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the cosine times the similarity ``[N, B]`` of each key and unit features ``[B, D]``.

        ``text``: unit rows ``[C, D]`` of another text classifier than the frozen one.
        """
        keys = self.get_buffer("keys")
        return (keys @ unit.t()) * self.similarity(self.probabilities(unit, text), self.probabilities(keys, text))


def cache_shots(images: int, classes: int, fraction: float = 0.3) -> int:
    """Return the paper's number of images per class: a fraction of all, at least 9 and at most 16."""
    return min(max(int(fraction * images / classes), 9), 16)


def kl_matrix(log: Tensor, other_log: Tensor) -> Tensor:
    """Return ``KL(p_b || q_n)`` ``[B, N]`` of distributions given by their logarithms ``[B, C]`` and ``[N, C]``."""
    p = log.exp()
    return (p * log).sum(dim=-1, keepdim=True) - p @ other_log.t()


def candidate_divergence(log: Tensor) -> Tensor:
    """Return ``sum_m KL(q_j || q_m)`` ``[J]`` of each of J distributions, given their logarithms ``[J, C]``."""
    log = log.double()
    q = log.exp()
    return len(log) * (q * log).sum(dim=-1) - q @ log.sum(dim=0)


def marginal_loss(logits: Tensor) -> Tensor:
    """Return ``sum_c p_c ln(p_c + 1e-6)`` of the mean probabilities of a batch ``[B, C]``: -ln C where they are equal.

    Its minimum spreads the batch evenly over the classes (TFUP-T).
    """
    mean = F.softmax(logits, dim=-1).mean(dim=0)
    return (mean * (mean + 1e-6).log()).sum()
