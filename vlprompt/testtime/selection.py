"""Selection of views of a test image: entropies, confidence selection and DiffTPT's filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._shapes import check_shape
from vlprompt.config.types import Gt, Le, Words

Variant = Literal["paper", "code"]
ViewFraction: TypeAlias = Annotated[float, Gt(0), Le(1), Words("a fraction of the views, above 0 and at most 1")]


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy ``[...]`` in nats of the softmax of ``logits`` ``[..., C]``."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Return TPT's loss: the entropy ``[...]`` in nats of the mean softmax of n views, ``logits`` ``[..., n, C]``.

    It is computed from log probabilities, so probabilities may underflow. Subtracting ``logsumexp`` instead of calling
    ``log_softmax`` rounds as the official code does (azshue/TPT 63ecbac, tpt_classification.py 46-51;
    chunmeifeng/DiffTPT 03f1169, difftpt_utils.py 90-95): a loss far below 1 has few correct digits in float32.
    """
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    mean = log_p.logsumexp(dim=-2) - math.log(logits.shape[-2])
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean * mean.exp()).sum(dim=-1)


def kept(count: int, fraction: float) -> int:
    """Return the number of views that a filter keeps of ``count``: ``int(count * fraction)``, but at least 1 if any."""
    return min(count, max(1, int(count * fraction)))


def most_confident(logits: Tensor, fraction: float) -> Tensor:
    """Return the views of lowest entropy ``[B, n]``, most confident first (TPT: select_confident_samples).

    Args:
        logits: ``[B, V, C]``; view 0 is treated like the others.
        fraction: Fraction of V; at least one view is kept.
    """
    order = entropy(logits).argsort(dim=-1, stable=True)
    return order[:, : kept(logits.shape[1], fraction)]


def gather_views(values: Tensor, views: Tensor) -> Tensor:
    """Return the entries ``[B, n, ...]`` of ``values`` ``[B, V, ...]`` at the chosen ``views`` ``[B, n]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], views]


def similarity_to_first(vectors: Tensor) -> Tensor:
    """Return the cosines ``[B, V - 1]`` between view 0 and the other views of ``vectors`` ``[B, V, K]``."""
    return F.cosine_similarity(vectors[:, :1], vectors[:, 1:], dim=-1, eps=1e-8)


def most_similar(vectors: Tensor, fraction: float) -> Tensor:
    """Return the indices ``[B, k]`` of the views nearest to view 0 by cosine, nearest first, without view 0.

    Args:
        vectors: Logits ``[B, V, C]`` or features ``[B, V, D]``.
        fraction: Fraction of V - 1; at least one view is kept if there is one.
    """
    order = similarity_to_first(vectors).argsort(dim=-1, descending=True, stable=True)
    return order[:, : kept(vectors.shape[1] - 1, fraction)] + 1


@dataclass(frozen=True)
class Filtered:
    """Views kept by DiffTPT's two filters.

    Attributes:
        similar: ``[B, k]``, indices of the views kept by the cosine filter, nearest first.
        confident: ``[B, n]``, positions in ``candidates`` kept by the entropy filter, most confident first.
        candidates: ``[B, m]``, indices of the views that the entropy filter chooses from.
        selected: ``[B, n]``, indices of the selected views.
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
        logits: ``[B, V, C]`` of the test view, standard augmentations and generated images, in this order.
        features: ``[B, V, D]``, unit vectors.
        similarity: Fraction kept by the cosine filter.
        confidence: Fraction kept by the entropy filter.
        generated: Number of generated images, which are the last views.
        variant: ``code`` filters all views by the cosine of their logits, then by entropy. ``paper`` filters standard
            views only by entropy, and generated ones by the cosine of their features, then by entropy.

    Raises:
        DataError: ``logits`` or ``features`` of another shape, or that are no floats.
    """
    check_shape(logits, "logits", ("B", "V", "C"))
    check_shape(features, "features", (*logits.shape[:2], "D"))
    if variant == "code":
        similar = most_similar(logits, similarity)
        candidates = F.pad(similar, (1, 0))  # view 0 always passes the cosine filter
        return _by_entropy(logits, similar, [candidates], confidence)
    standard = logits.shape[1] - generated
    first = torch.arange(standard, device=logits.device).expand(len(logits), -1)
    if not generated:
        return _by_entropy(logits, first[:, :0], [first], confidence)
    with_generated = torch.cat([features[:, :1], features[:, standard:]], dim=1)
    similar = most_similar(with_generated, similarity) + standard - 1
    return _by_entropy(logits, similar, [first, similar], confidence)


def _by_entropy(logits: Tensor, similar: Tensor, groups: Sequence[Tensor], confidence: float) -> Filtered:
    """Keep the most confident fraction of each group of candidate views ``[B, m]``."""
    confident, offset = [], 0
    for views in groups:
        confident.append(most_confident(gather_views(logits, views), confidence) + offset)
        offset += views.shape[1]
    candidates, positions = torch.cat(list(groups), dim=1), torch.cat(confident, dim=1)
    return Filtered(similar, positions, candidates, candidates.gather(1, positions))
