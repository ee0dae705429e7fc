"""ZERO's votes (specs/test_time_and_cache.md 11.8 and appendix A, X4)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.testtime.selection import entropy
from vlprompt.testtime.zero import ranked_logits, vote


def by_hand(logits: Tensor, fraction: float) -> int:
    """The winner of one image, ``logits`` ``[V, C]``, by the rule as it is told."""
    order = entropy(logits).argsort(stable=True).tolist()
    count = max(1, int(len(order) * fraction))
    votes = Counter(int(logits[v].argmax()) for v in order[:count])
    most = max(votes.values())
    tied = [c for c, own in votes.items() if own == most]
    if len(tied) == 1:
        return tied[0]
    others = order[count:]
    for v in others:
        if int(logits[v].argmax()) in tied:
            return int(logits[v].argmax())
    judge = logits[others[0] if others else 0]
    return max(sorted(tied), key=lambda c: float(judge[c]))


def test_the_votes_of_the_appendix() -> None:
    rng = np.random.RandomState(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    text = unit(rng.randn(7, 16))
    views = unit(unit(rng.randn(1, 16)) + 0.6 * unit(rng.randn(64, 16)))
    found = vote(torch.from_numpy(20 * views @ text.T)[None])
    assert found.counts.tolist() == [[11, 0, 4, 0, 4, 0, 0]] and found.selected.shape == (1, 19)
    assert found.winners.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 6), st.floats(0.05, 1.0))
def test_winners_are_those_of_the_rule_and_logits_follow_the_votes(
    seed: int, views: int, classes: int, fraction: float
) -> None:
    logits = 3 * torch.randn(4, views, classes, generator=torch.Generator().manual_seed(seed))
    found = vote(logits, fraction)
    assert found.winners.tolist() == [by_hand(one, fraction) for one in logits]
    assert bool((found.counts.sum(dim=1) == max(1, int(views * fraction))).all())
    ranked = ranked_logits(found, logits[:, 0])
    assert ranked.argmax(dim=1).tolist() == found.winners.tolist()
    assert torch.equal(ranked.sort(dim=1).values, logits[:, 0].sort(dim=1).values)
    for own, counts in zip(ranked, found.counts, strict=True):
        in_order = counts[own.argsort(descending=True)].tolist()
        assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("views", [1, 2, 30])
def test_one_view_and_equal_views_are_zero_shot(views: int) -> None:
    logits = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ranked_logits(vote(logits.expand(-1, views, -1)), logits[:, 0]), logits[:, 0])


def test_a_tie_goes_to_the_surest_of_the_other_views() -> None:
    # Two views vote, for 0 and for 1; the third is for 2, the fourth for 1.
    logits = torch.tensor([[[9.0, 0, 0], [0, 8.0, 0], [0, 0, 3.0], [0, 2.0, 0]]])
    assert vote(logits, 0.5).winners.tolist() == [1]
    # No other view is for one of the tied: the surest of them decides by its own logits.
    without = torch.tensor([[[9.0, 0, 0], [0, 8.0, 0], [0, 0.5, 3.0]]])
    assert vote(without, 0.7).winners.tolist() == [1]
    # Everybody has voted: the test view decides.
    assert vote(logits[:, :2].flip(1), 1.0).winners.tolist() == [1]


def test_no_images_give_no_votes() -> None:
    assert ranked_logits(vote(torch.zeros(0, 4, 3)), torch.zeros(0, 3)).shape == (0, 3)
