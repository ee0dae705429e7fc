"""Which views of a test image are believed: entropies, confidence selection, and DiffTPT's filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.errors import ConfigError

Variant = Literal["paper", "code"]


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless ``settings.<name>`` is a fraction of the views, above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ConfigError(f"settings.{name} is {value}; accepted: a fraction of the views, above 0 and at most 1")


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy ``[...]`` in nats of the softmax of ``logits`` ``[..., C]``."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Return the entropy ``[...]`` in nats of the mean softmax of n views, ``logits`` ``[..., n, C]``: TPT's loss.

    Computed from log probabilities, so that a probability that underflows costs nothing.
    """
    mean = logits.log_softmax(dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean * mean.exp()).sum(dim=-1)


def kept(count: int, fraction: float) -> int:
    """Return how many of ``count`` views a filter keeps: ``int(count * fraction)``, but never none of some."""
    return min(count, max(1, int(count * fraction)))


def most_confident(logits: Tensor, fraction: float) -> Tensor:
    """Return the views of least entropy, ``[B, n]``, the surest first (TPT: select_confident_samples).

    Args:
        logits: ``[B, V, C]``; view 0 competes like any other.
        fraction: Of V; at least one view is kept.
    """
    order = entropy(logits).argsort(dim=-1, stable=True)
    return order[:, : kept(logits.shape[1], fraction)]


def gather_views(values: Tensor, views: Tensor) -> Tensor:
    """Return ``values`` ``[B, V, ...]`` of the chosen ``views`` ``[B, n]``: ``[B, n, ...]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], views]


def similarity_to_first(vectors: Tensor) -> Tensor:
    """Return the cosine ``[B, V - 1]`` of ``vectors`` ``[B, V, K]`` of every other view with that of view 0."""
    return F.cosine_similarity(vectors[:, :1], vectors[:, 1:], dim=-1, eps=1e-8)


def most_similar(vectors: Tensor, fraction: float) -> Tensor:
    """Return the numbers ``[B, k]`` of the views nearest to view 0 by cosine, the nearest first; never view 0 itself.

    Args:
        vectors: Logits ``[B, V, C]`` or features ``[B, V, D]``.
        fraction: Of V - 1; at least one view is kept where there is one.
    """
    order = similarity_to_first(vectors).argsort(dim=-1, descending=True, stable=True)
    return order[:, : kept(vectors.shape[1] - 1, fraction)] + 1


@dataclass(frozen=True)
class Filtered:
    """What DiffTPT's two filters keep of each image.

    Attributes:
        similar: ``[B, k]`` view numbers that the cosine filter keeps, the nearest first.
        confident: ``[B, n]`` positions in ``candidates`` that the entropy filter keeps, the surest first.
        candidates: ``[B, m]`` view numbers that the entropy filter chooses among.
        selected: ``[B, n]`` view numbers.
    """

    similar: Tensor
    confident: Tensor
    candidates: Tensor
    selected: Tensor


def filter_views(
    logits: Tensor,
    features: Tensor,
    *,
    similarity: float,
    confidence: float,
    generated: int,
    variant: Variant = "code",
) -> Filtered:
    """Return DiffTPT's selection; the two variants are described in :mod:`vlprompt.methods.difftpt`.

    Args:
        logits: ``[B, V, C]``: the test view, standard augmentations, generated pictures.
        features: ``[B, V, D]``, unit.
        similarity: Fraction that the cosine filter keeps.
        confidence: Fraction that the entropy filter keeps.
        generated: How many views at the end are generated pictures.
        variant: ``code`` filters all views by the cosine of their logits, then by entropy; ``paper`` filters standard
            views by entropy alone and generated ones by the cosine of their features, then by entropy.
    """
    if variant == "code":
        similar = most_similar(logits, similarity)
        candidates = F.pad(similar, (1, 0))  # view 0 always passes the cosine filter
        return _by_entropy(logits, similar, [candidates], confidence)
    standard = logits.shape[1] - generated
    first = torch.arange(standard, device=logits.device).expand(len(logits), -1)
    if not generated:
        return _by_entropy(logits, first[:, :0], [first], confidence)
    beside_first = torch.cat([features[:, :1], features[:, standard:]], dim=1)
    similar = most_similar(beside_first, similarity) + standard - 1
    return _by_entropy(logits, similar, [first, similar], confidence)


def _by_entropy(logits: Tensor, similar: Tensor, groups: Sequence[Tensor], confidence: float) -> Filtered:
    """Keep a fraction of each group of candidate views ``[B, m]``."""
    confident, before = [], 0
    for views in groups:
        confident.append(most_confident(gather_views(logits, views), confidence) + before)
        before += views.shape[1]
    candidates, positions = torch.cat(list(groups), dim=1), torch.cat(confident, dim=1)
    return Filtered(similar, positions, candidates, candidates.gather(1, positions))
