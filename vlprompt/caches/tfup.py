"""TFUP: a cache of unlabelled images of the target domain (Long et al., 2024; arXiv 2404.16339).

Images are chosen by how sure zero-shot CLIP is of them and by how near they are to the others it is sure of; they get
the class that chose them. How near a key is to an image is the cosine of their features times the likeness of their
class probabilities. Official code: wlb12345/TFUP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.base import KeyValueCache
from vlprompt.errors import DataError


class TFUP(KeyValueCache):
    """The training-free cache: ``logits = scale f W^T + alpha exp(-beta (1 - A)) V`` with ``A = (f . k) S``.

    S, between 0 and 2, falls with the divergence of the class probabilities of image and key. So A may exceed 1.

    Args:
        text_features: Text classifier ``[C, D]``.
        logit_scale: What cosines are multiplied by.
        alpha: Weight of what the cache says; 0 is zero-shot.
        beta: Sharpness of the affinities.
        temperature: What cosines are multiplied by before the softmax that ranks and compares images.
        shots: Images of each class; 0 takes the paper's rule, :func:`cache_shots`.
    """

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float | Tensor = 100.0,
        *,
        alpha: float = 0.3,
        beta: float = 1.0,
        temperature: float = 10.0,
        shots: int = 0,
    ) -> None:
        super().__init__(text_features, logit_scale, alpha=alpha, beta=beta)
        self.temperature, self.shots = temperature, shots

    def fit(self, features: Tensor, labels: Tensor | None = None) -> TFUP:
        """Choose the images of each class and keep them.

        Args:
            features: Raw features ``[U, D]`` of unlabelled images. One image may be chosen by several classes.
            labels: Not looked at; there for scikit-learn's manners.

        Raises:
            DataError: There are no images, or their features have another size.
        """
        chosen = self.select(features, self.shots or cache_shots(len(features), self.classes))
        labels = torch.arange(self.classes, device=chosen.device).repeat_interleave(chosen.shape[1])
        self._set(keys=self.unit(features[chosen.flatten()]), labels=labels)
        return self

    def probabilities(self, unit: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the logarithms of the class probabilities ``[B, C]`` of unit features ``[B, D]``.

        ``text``: unit rows ``[C, D]`` of another text classifier than the frozen one.
        """
        text = self.text if text is None else text
        return (self.temperature * unit @ text.t()).log_softmax(dim=-1)

    def select(self, features: Tensor, shots: int) -> Tensor:
        """Return the images ``[C, K]`` that each class chooses, the most central first; K is ``shots``, or all images.

        Of the 2K images with the largest probability of the class (whatever their most probable class), those K are
        kept whose divergence from all of the 2K adds up to least.

        Args:
            features: Raw features ``[U, D]``.
            shots: K.

        Raises:
            DataError: There are no images, or their features have another size.
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
        """Return S ``[N, B]``: the divergences of an image's probabilities from the keys', turned round to 0 to 2.

        2 for the nearest of the keys, 0 for the farthest; 2 for all where none is nearer than another. (The published
        code also standardises the row before, which the minimum and maximum cancel.)

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

    To lessen it is to spread the batch over the classes (TFUP-T).
    """
    mean = F.softmax(logits, dim=-1).mean(dim=0)
    return (mean * (mean + 1e-6).log()).sum()


__all__ = ["TFUP", "cache_shots", "candidate_divergence", "kl_matrix", "marginal_loss"]
