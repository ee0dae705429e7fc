"""Entropies, confidence selection and DiffTPT's filters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.testtime.selection import (
    entropy,
    filter_views,
    gather_views,
    kept,
    marginal_entropy,
    most_confident,
    most_similar,
)


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    """Text ``[7, 16]`` and views ``[1, 64, 16]`` of the reference values, in float64."""
    rng = np.random.RandomState(0)

    def unit(x: Any) -> Any:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    text = unit(rng.randn(7, 16))
    views = unit(unit(rng.randn(1, 16)) + 0.6 * unit(rng.randn(64, 16)))
    return torch.from_numpy(text), torch.from_numpy(views)[None]


def random_logits(seed: int, *shape: int, spread: float = 5.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_selection_and_loss_match_reference_values(reference: tuple[Tensor, Tensor]) -> None:
    text, views = reference
    logits = 20 * views @ text.t()
    chosen = most_confident(logits, 0.1)
    assert chosen.tolist() == [[46, 0, 39, 51, 14, 44]]
    assert float(marginal_entropy(gather_views(logits, chosen))[0]) == pytest.approx(0.7399756813, abs=1e-9)


def test_difftpts_filters_match_reference_values(reference: tuple[Tensor, Tensor]) -> None:
    text, views = reference
    logits = 20 * views @ text.t()
    filtered = filter_views(logits, views, similarity=0.8, confidence=0.3, generated=31)
    assert (filtered.similar.shape[1], filtered.selected.shape[1]) == (50, 15)
    assert float(marginal_entropy(gather_views(logits, filtered.selected))[0]) == pytest.approx(0.9368100857, abs=1e-9)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(64, 0.1, 6), (127, 0.8, 101), (102, 0.3, 30), (63, 0.3, 18), (64, 0.3, 19), (32, 0.1, 3), (5, 0.1, 1), (1, 1, 1)],
)
def test_number_of_kept_views(count: int, fraction: float, expected: int) -> None:
    assert kept(count, fraction) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12))
def test_entropies_are_between_zero_and_log_c(seed: int, views: int, classes: int) -> None:
    logits = random_logits(seed, 3, views, classes)
    for values in (entropy(logits), marginal_entropy(logits)):
        assert bool((values >= -1e-12).all()) and bool((values <= math.log(classes) + 1e-12).all())
    # The entropy of a mean is at least the mean of the entropies; with one view both are equal.
    assert bool((marginal_entropy(logits) >= entropy(logits).mean(dim=1) - 1e-12).all())
    torch.testing.assert_close(marginal_entropy(logits[:, :1]), entropy(logits[:, 0]))
    repeated = logits[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(marginal_entropy(repeated), entropy(logits[:, 0]))


@pytest.mark.parametrize("scale", [20.0, 40.0, 100.0])
def test_small_losses_are_rounded_as_in_the_official_code(scale: float) -> None:
    # azshue/TPT 63ecbac, tpt_classification.py 46-51: at these scales float32 keeps 1 to 3 digits of the loss, so the
    # order of operations decides the others.
    torch.manual_seed(0)
    for _ in range(20):
        text = F.normalize(torch.randn(10, 64), dim=-1)
        views = F.normalize(text[0] + torch.randn(6, 64) / 10, dim=-1)
        logits = (scale * views @ text.t()).requires_grad_()
        log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
        average = log_p.logsumexp(dim=0) - math.log(len(log_p))
        expected, found = -(average * average.exp()).sum(), marginal_entropy(logits)
        assert torch.equal(found, expected) and bool(expected < 0.01)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
        assert torch.equal(*gradients)


def test_probabilities_that_underflow_give_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4], [1e4, -1e4, 0.0]]], requires_grad=True)
    loss = marginal_entropy(logits).sum()
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and bool(logits.grad.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.integers(1, 30))
def test_the_most_confident_views_are_chosen_in_any_order_of_views(seed: int, fraction: float, views: int) -> None:
    logits = random_logits(seed, 2, views, 5)
    chosen = most_confident(logits, fraction)
    assert chosen.shape == (2, kept(views, fraction))
    entropies = entropy(gather_views(logits, chosen))
    assert bool((entropies.diff(dim=1) >= 0).all())
    for row, all_entropies in zip(chosen, entropy(logits), strict=True):
        others = all_entropies[[v for v in range(views) if v not in row.tolist()]]
        assert not len(others) or float(others.min()) >= float(all_entropies[row].max())
    order = torch.randperm(views, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(order[most_confident(logits[:, order], fraction)], chosen)


def test_copies_of_the_test_view_are_the_most_similar() -> None:
    features = F.normalize(random_logits(1, 2, 9, 8), dim=-1)
    features[:, 6:] = features[:, :1]
    assert most_similar(features, 3 / 8).sort().values.tolist() == [[6, 7, 8]] * 2


def test_the_test_view_always_passes_the_cosine_filter_of_the_code_variant() -> None:
    logits = random_logits(2, 4, 16, 5)
    filtered = filter_views(logits, logits, similarity=0.5, confidence=1.0, generated=7)
    assert (filtered.candidates[:, 0] == 0).all() and filtered.similar.shape == (4, 7)
    torch.testing.assert_close(filtered.candidates[:, 1:], filtered.similar)
    assert bool((filtered.selected.sort().values == filtered.candidates.sort().values).all())


def test_the_paper_variant_filters_both_kinds_separately() -> None:
    logits, features = random_logits(3, 2, 20, 5), F.normalize(random_logits(4, 2, 20, 8), dim=-1)
    options = {"similarity": 0.5, "confidence": 0.4, "generated": 8}
    filtered = filter_views(logits, features, variant="paper", **options)  # type: ignore[arg-type]
    # Entropy keeps 4 of 12 standard views. The cosine of features keeps 4 of 8 generated ones, entropy 1 of these.
    standard, generated = filtered.selected[:, :4], filtered.selected[:, 4:]
    torch.testing.assert_close(standard, most_confident(logits[:, :12], 0.4))
    assert generated.shape == (2, 1) and bool((generated >= 12).all())
    cosines = (features[:, 12:] * features[:, :1]).sum(dim=-1)
    nearest = cosines.argsort(dim=1, descending=True)[:, :4] + 12
    torch.testing.assert_close(filtered.similar, nearest)
    best = entropy(gather_views(logits, nearest)).argmin(dim=1)
    torch.testing.assert_close(generated[:, 0], nearest[torch.arange(2), best])


def test_without_generated_images_the_paper_variant_is_tpts_selection() -> None:
    logits = random_logits(5, 3, 12, 4)
    filtered = filter_views(logits, logits, similarity=0.8, confidence=0.3, generated=0, variant="paper")
    torch.testing.assert_close(filtered.selected, most_confident(logits, 0.3))
    unfiltered = filter_views(logits, logits, similarity=1.0, confidence=0.3, generated=0)
    torch.testing.assert_close(unfiltered.selected.sort().values, most_confident(logits, 0.3).sort().values)
