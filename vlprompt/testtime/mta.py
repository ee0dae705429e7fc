"""MTA: a robust mean of the views' features (Zanella and Ben Ayed, CVPR 2024; arXiv 2405.02266).

A mean shift weights the views by inlierness scores. The scores favour views near the mode and views with similar
predictions. The constants are those of the published code. No gradients are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._shapes import check_shape

_LEAST_BANDWIDTH = 1e-12  # of squared bandwidths; avoids 0 / 0 for identical views


@dataclass(frozen=True)
class MeanShift:
    """Modes and inlierness scores of the views of B images.

    Attributes:
        mode: ``[B, D]``, unit vectors.
        inlierness: ``[B, V]``; the scores of an image sum to 1.
        bandwidth: ``[B, V]``, bandwidth of the kernel around each view: the root of half the mean squared distance to
            the nearest views.
        affinity: ``[B, V, V]`` inner products of the views' class probabilities.
    """

    mode: Tensor
    inlierness: Tensor
    bandwidth: Tensor
    affinity: Tensor


def affinities(logits: Tensor) -> Tensor:
    """Return the inner products ``[B, V, V]`` of the class probabilities of ``logits`` ``[B, V, C]``."""
    p = logits.softmax(dim=-1)
    return p @ p.transpose(1, 2)


def bandwidths(views: Tensor, neighbours: float = 0.3) -> Tensor:
    """Return ``[B, V]``: the root of half the mean squared distance of each view to its nearest views.

    Args:
        views: Unit features ``[B, V, D]``.
        neighbours: Fraction of the other V - 1 views that count as nearest; at least one view.
    """
    count = views.shape[1]
    if count == 1:
        return views.new_full(views.shape[:2], _LEAST_BANDWIDTH**0.5)
    squared = (2 - 2 * views @ views.transpose(1, 2)).clamp(min=0)
    nearest = max(1, int(neighbours * (count - 1)))
    near = squared.sort(dim=-1).values[..., 1 : nearest + 1]  # the first is the view itself
    return (0.5 * near.mean(dim=-1)).clamp(min=_LEAST_BANDWIDTH).sqrt()


def density(views: Tensor, mode: Tensor, bandwidth: Tensor) -> Tensor:
    """Return the Gaussian kernel ``[B, V]`` of ``views`` ``[B, V, D]`` around ``mode`` ``[B, D]``."""
    return (-(views - mode[:, None]).square().sum(dim=-1) / (2 * bandwidth.square())).exp()


def inlierness_step(kernel: Tensor, affinity: Tensor, scores: Tensor, lambda_q: float, lambda_y: float) -> Tensor:
    """Return the next inlierness scores ``[B, V]``: ``softmax((K + lambda_q A y) / lambda_y)``."""
    agreement = (affinity @ scores[..., None]).squeeze(-1)
    return ((kernel + lambda_q * agreement) / lambda_y).softmax(dim=-1)


def mode_step(views: Tensor, mode: Tensor, kernel: Tensor, scores: Tensor) -> Tensor:
    """Return the next unit mode ``[B, D]``: the mean of ``views`` weighted by kernel and scores."""
    weights = kernel * scores
    total = weights.sum(dim=-1, keepdim=True)
    mean = (weights[..., None] * views).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    # If every kernel underflows, the mode does not change.
    return torch.where(total > 0, F.normalize(mean, dim=-1), mode)


def mean_shift(
    views: Tensor,
    logits: Tensor,
    *,
    lambda_q: float = 4.0,
    lambda_y: float = 0.2,
    neighbours: float = 0.3,
    rounds: int = 5,
    tolerance: float = 1e-6,
) -> MeanShift:
    """Return modes and scores of B images; each image stops independently of the others.

    Args:
        views: Unit features ``[B, V, D]``; the search starts at view 0. The mode of one view, or of equal views, is
            that view.
        logits: Logits ``[B, V, C]`` of the views.
        lambda_q: Weight of the agreement between predictions.
        lambda_y: Weight of the entropy of the scores; small values select few views.
        neighbours: See :func:`bandwidths`.
        rounds: Number of outer rounds, and maximum number of inner rounds of either kind.
        tolerance: Change (2-norm) below which inner rounds stop.

    Raises:
        DataError: ``views`` or ``logits`` of another shape, or that are no floats.
    """
    check_shape(views, "views", ("B", "V", "D"))
    check_shape(logits, "logits", (*views.shape[:2], "C"))
    affinity, bandwidth = affinities(logits), bandwidths(views, neighbours)
    mode = views[:, 0]
    scores = views.new_full(views.shape[:2], 1 / views.shape[1])
    for _ in range(rounds):
        kernel = density(views, mode, bandwidth)
        moving = torch.ones(len(views), 1, dtype=torch.bool, device=views.device)
        for _ in range(rounds):
            new = torch.where(moving, inlierness_step(kernel, affinity, scores, lambda_q, lambda_y), scores)
            moving = moving & ((new - scores).norm(dim=-1, keepdim=True) >= tolerance)
            scores = new
        moving = torch.ones_like(moving)
        for _ in range(rounds):
            new = torch.where(moving, mode_step(views, mode, density(views, mode, bandwidth), scores), mode)
            moving = moving & ((new - mode).norm(dim=-1, keepdim=True) >= tolerance)
            mode = new
    return MeanShift(mode, scores, bandwidth, affinity)
