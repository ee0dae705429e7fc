"""ZERO: voting of views at zero temperature (Farina et al., NeurIPS 2024; arXiv 2405.18330)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt._shapes import check_shape
from vlprompt.testtime.selection import gather_views, most_confident


@dataclass(frozen=True)
class Votes:
    """Votes of the views of B images.

    Attributes:
        counts: ``[B, C]``, number of votes per class; with a temperature, the sum of the views' probabilities.
        selected: ``[B, n]``, views that voted, most confident first.
        winners: ``[B]``, the winning class.
    """

    counts: Tensor
    selected: Tensor
    winners: Tensor


def vote(logits: Tensor, fraction: float = 0.3, temperature: float = 0.0) -> Votes:
    """Return the votes of the most confident views.

    The class with the most votes wins. A tie is resolved by the most confident non-voting view that predicts one of the
    tied classes. If there is none, the most confident non-voting view (view 0 if all views voted) decides by its
    largest logit among the tied classes.

    Args:
        logits: ``[B, V, C]``.
        fraction: Fraction of the V views that vote.
        temperature: Divisor of the logits; 0 for one vote per view.

    Raises:
        DataError: ``logits`` of another shape, or that are no floats.
    """
    check_shape(logits, "logits", ("B", "V", "C"))
    selected = most_confident(logits, 1.0)
    count = most_confident(logits, fraction).shape[1]
    choices = logits.argmax(dim=-1)  # [B, V]
    votes = gather_views(choices, selected[:, :count])
    counts = torch.zeros(len(logits), logits.shape[-1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(1, votes, torch.ones_like(votes))
    if temperature:
        counts = (gather_views(logits, selected[:, :count]) / temperature).softmax(dim=-1).sum(dim=1)
    tied = counts == counts.max(dim=-1, keepdim=True).values  # [B, C]
    others = selected[:, count:]
    decider = others[:, :1] if others.shape[1] else torch.zeros_like(selected[:, :1])
    decision = gather_views(logits, decider)[:, 0].masked_fill(~tied, float("-inf")).argmax(dim=-1)
    if others.shape[1]:
        other_choices = gather_views(choices, others)
        for_tied = tied.gather(1, other_choices)
        first = other_choices.gather(1, for_tied.int().argmax(dim=1, keepdim=True)).squeeze(1)
        decision = torch.where(for_tied.any(dim=1), first, decision)
    winners = torch.where(tied.sum(dim=-1) == 1, counts.argmax(dim=-1), decision)
    return Votes(counts, selected[:, :count], winners)


def ranked_logits(votes: Votes, logits: Tensor) -> Tensor:
    """Return ``[B, C]``: the values of ``logits`` ``[B, C]``, reassigned to the classes in the order of the votes.

    The winner gets the largest value. The other classes follow by votes, then by logits. The largest value is therefore
    ZERO's prediction, probabilities keep their sharpness, and logits that agree with the votes do not change.
    """
    by_logit = logits.argsort(dim=-1, descending=True, stable=True)
    counts = votes.counts.scatter_add(1, votes.winners[:, None], torch.ones_like(votes.counts[:, :1]))
    by_votes = counts.gather(1, by_logit).argsort(dim=-1, descending=True, stable=True)
    order = by_logit.gather(1, by_votes)
    return torch.empty_like(logits).scatter(1, order, logits.gather(1, by_logit))
