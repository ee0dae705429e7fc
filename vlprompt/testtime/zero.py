"""ZERO: views vote, at zero temperature (Farina et al., NeurIPS 2024; arXiv 2405.18330)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.testtime.selection import gather_views, most_confident


@dataclass(frozen=True)
class Votes:
    """The votes of B images.

    Attributes:
        counts: ``[B, C]`` int64, votes for each class.
        selected: ``[B, n]`` views that voted, the surest first.
        winners: ``[B]`` the class that won.
    """

    counts: Tensor
    selected: Tensor
    winners: Tensor


def vote(logits: Tensor, fraction: float = 0.3) -> Votes:
    """Return what the most confident views vote for.

    The class with most votes wins. Where several have as many, the surest of the other views that is for one of them
    decides; where none is, the surest of the other views decides by its largest logit among them (view 0, where all
    views have voted).

    Args:
        logits: ``[B, V, C]``.
        fraction: Of the V views, those that vote.
    """
    selected = most_confident(logits, 1.0)
    count = most_confident(logits, fraction).shape[1]
    choices = logits.argmax(dim=-1)  # [B, V]
    votes = gather_views(choices, selected[:, :count])
    counts = torch.zeros(len(logits), logits.shape[-1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(1, votes, torch.ones_like(votes))
    tied = counts == counts.max(dim=-1, keepdim=True).values  # [B, C]
    others = selected[:, count:]
    judge = others[:, :1] if others.shape[1] else torch.zeros_like(selected[:, :1])
    last_word = gather_views(logits, judge)[:, 0].masked_fill(~tied, float("-inf")).argmax(dim=-1)
    if others.shape[1]:
        theirs = gather_views(choices, others)
        for_tied = tied.gather(1, theirs)
        first = theirs.gather(1, for_tied.int().argmax(dim=1, keepdim=True)).squeeze(1)
        last_word = torch.where(for_tied.any(dim=1), first, last_word)
    winners = torch.where(tied.sum(dim=-1) == 1, counts.argmax(dim=-1), last_word)
    return Votes(counts, selected[:, :count], winners)


def ranked_logits(votes: Votes, logits: Tensor) -> Tensor:
    """Return ``[B, C]``: the values of ``logits`` ``[B, C]`` dealt out anew, in the order of the votes.

    The winner gets the largest, then come classes by their votes, then by their own logits. So the largest is ZERO's
    prediction, probabilities keep their sharpness, and logits that agree with the votes stay as they are.
    """
    by_logit = logits.argsort(dim=-1, descending=True, stable=True)
    counts = votes.counts.scatter_add(1, votes.winners[:, None], torch.ones_like(votes.winners[:, None]))
    by_votes = counts.gather(1, by_logit).argsort(dim=-1, descending=True, stable=True)
    order = by_logit.gather(1, by_votes)
    return torch.empty_like(logits).scatter(1, order, logits.gather(1, by_logit))
