"""ZERO's votes: reference values, the rule for ties and edge cases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.testtime.selection import entropy
from vlprompt.testtime.zero import ranked_logits, vote


def by_hand(logits: Tensor, fraction: float) -> int:
    """Return the winner of one image, ``logits`` ``[V, C]``, by a plain implementation of the rule."""
    order = entropy(logits).argsort(stable=True).tolist()
    count = max(1, int(len(order) * fraction))
    votes = Counter(int(logits[v].argmax()) for v in order[:count])
    most = max(votes.values())
    tied = [c for c, number in votes.items() if number == most]
    if len(tied) == 1:
        return tied[0]
    others = order[count:]
    for v in others:
        if int(logits[v].argmax()) in tied:
            return int(logits[v].argmax())
    decider = logits[others[0] if others else 0]
    return max(sorted(tied), key=lambda c: float(decider[c]))


def test_votes_match_reference_values() -> None:
    rng = np.random.RandomState(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    text = unit(rng.randn(7, 16))
    views = unit(unit(rng.randn(1, 16)) + 0.6 * unit(rng.randn(64, 16)))
    votes = vote(torch.from_numpy(20 * views @ text.T)[None])
    assert votes.counts.tolist() == [[11, 0, 4, 0, 4, 0, 0]] and votes.selected.shape == (1, 19)
    assert votes.winners.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 6), st.floats(0.05, 1.0))
def test_winners_follow_the_rule_and_logits_follow_the_votes(
    seed: int, views: int, classes: int, fraction: float
) -> None:
    logits = 3 * torch.randn(4, views, classes, generator=torch.Generator().manual_seed(seed))
    votes = vote(logits, fraction)
    assert votes.winners.tolist() == [by_hand(image, fraction) for image in logits]
    assert bool((votes.counts.sum(dim=1) == max(1, int(views * fraction))).all())
    ranked = ranked_logits(votes, logits[:, 0])
    assert ranked.argmax(dim=1).tolist() == votes.winners.tolist()
    assert torch.equal(ranked.sort(dim=1).values, logits[:, 0].sort(dim=1).values)
    for row, counts in zip(ranked, votes.counts, strict=True):
        in_order = counts[row.argsort(descending=True)].tolist()
        assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("views", [1, 2, 30])
def test_one_view_and_equal_views_are_zero_shot(views: int) -> None:
    logits = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ranked_logits(vote(logits.expand(-1, views, -1)), logits[:, 0]), logits[:, 0])


def test_the_most_confident_other_view_resolves_a_tie() -> None:
    # Two views vote for 0 and for 1. The third predicts 2, the fourth predicts 1.
    logits = torch.tensor([[[9.0, 0, 0], [0, 8.0, 0], [0, 0, 3.0], [0, 2.0, 0]]])
    assert vote(logits, 0.5).winners.tolist() == [1]
    # No other view predicts a tied class, so the most confident of them decides by its logits.
    without = torch.tensor([[[9.0, 0, 0], [0, 8.0, 0], [0, 0.5, 3.0]]])
    assert vote(without, 0.7).winners.tolist() == [1]
    # All views voted, so the test view decides.
    assert vote(logits[:, :2].flip(1), 1.0).winners.tolist() == [1]


def test_no_images_give_no_votes() -> None:
    assert ranked_logits(vote(torch.zeros(0, 4, 3)), torch.zeros(0, 3)).shape == (0, 3)


def test_votes_with_a_temperature_are_marginal_probabilities() -> None:
    """The official code sums the probabilities of the voting views, of cosines divided by a temperature."""
    logits = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(1))
    hard = vote(logits, 0.3)
    for temperature in (2**-10, 0.5):
        soft = vote(logits, 0.3, temperature)
        assert torch.equal(soft.selected, hard.selected)
        chosen = logits[torch.arange(3)[:, None], soft.selected]
        marginal = torch.softmax(chosen / temperature, dim=-1).sum(dim=1)
        torch.testing.assert_close(soft.counts, marginal)
        assert torch.equal(soft.winners, marginal.argmax(dim=-1))
        assert torch.equal(ranked_logits(soft, logits[:, 0]).argmax(dim=-1), soft.winners)
    torch.testing.assert_close(vote(logits, 0.3, 1e-9).counts, hard.counts.float())


def test_the_temperature_of_the_method_divides_cosines(tiny_backbone: Backbone) -> None:
    views = torch.randn(4, 12, tiny_backbone.embed_dim, generator=torch.Generator().manual_seed(2))
    method: Any = create_method("zero", tiny_backbone, ["cat", "dog", "bird"], temperature=2**-10)
    cosines = method.unit_views(views) @ method.initial_text_features().t()
    voting = method.votes(views).selected
    chosen = cosines[torch.arange(4)[:, None], voting]
    torch.testing.assert_close(method.votes(views).counts, (chosen / 2**-10).softmax(dim=-1).sum(dim=1))
    assert torch.equal(method(views).argmax(dim=-1), method.votes(views).winners)
