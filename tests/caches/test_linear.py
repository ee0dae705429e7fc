"""TaskRes's residual, the linear probe and LP++ against short references written from the equations."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.caches.linear_probe import LinearProbe, penalised_loss
from vlprompt.caches.lp_plus_plus import LPPlusPlus, step_sizes
from vlprompt.caches.residual import TaskResidual
from vlprompt.caches.search import search_exponent
from vlprompt.caches.training import EpochRecipe, orders
from vlprompt.errors import ConfigError, DataError
from vlprompt.schedule import warm_cosine

C, N, D = 5, 20, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(noise: float = 0.3, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Raw text ``[C, D]``, raw features ``[V, N, D]`` that lie around it, and labels ``[N]``; double precision."""
    text = 3 * F.normalize(normal(C, D), dim=-1)
    labels = torch.arange(C).repeat(N // C)
    return text, 2 * (text[labels] + noise * normal(views, N, D, seed=1)), labels


# -- TaskRes ----------------------------------------------------------------------------------------------------------
def test_a_residual_of_zero_is_zero_shot() -> None:
    text, features, labels = problem()
    unfitted = TaskResidual(text, 20.0)
    expected = 20 * F.normalize(features[0], dim=-1) @ F.normalize(text, dim=-1).t()
    torch.testing.assert_close(unfitted.logits(features[0]), expected)
    untrained = TaskResidual(text, 20.0, training=EpochRecipe(epochs=0, batch_size=8, lr=0.1)).fit(features, labels)
    assert untrained.is_fitted and not untrained.get_buffer("residual").any()
    torch.testing.assert_close(untrained.logits(features[0]), expected)
    trained = TaskResidual(text, 20.0, alpha=0.0, training=EpochRecipe(epochs=3, batch_size=8, lr=0.1))
    torch.testing.assert_close(trained.fit(features, labels).logits(features[0]), expected)


def test_the_residual_is_trained_as_published() -> None:
    """Adam with coupled weight decay written out; Dassl's schedule; partial batches left out; a view per epoch."""
    text, views, labels = problem(views=2)
    recipe = EpochRecipe(epochs=4, batch_size=8, lr=0.05, weight_decay=0.01)
    cache = TaskResidual(text, 20.0, alpha=0.5, training=recipe).fit(views, labels, seed=7)
    x = torch.zeros(C, D, dtype=torch.float64)
    first, second, count = torch.zeros_like(x), torch.zeros_like(x), 0
    for epoch, order in enumerate(orders(N, 4, 7)):
        rate = 1e-5 if epoch == 0 else 0.05 / 2 * (1 + math.cos(math.pi * (epoch - 1) / 4))
        for start in (0, 8):  # 20 images are two batches of 8; the other 4 are left out
            batch = order[start : start + 8]
            leaf = x.clone().requires_grad_()
            w = text + 0.5 * leaf
            f = views[epoch % 2, batch]
            logits = 20 * (f / f.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).t()
            loss = (logits.exp().sum(dim=1).log() - logits[range(8), labels[batch]]).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradient, count = gradient + 0.01 * x, count + 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            x = x - rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    torch.testing.assert_close(cache.get_buffer("residual"), x, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cache.adapted_text(), F.normalize(text + 0.5 * x, dim=-1), rtol=1e-6, atol=1e-8)


def test_a_residual_learns_what_zero_shot_gets_wrong() -> None:
    text, features, labels = problem(noise=0.1)
    wrong = TaskResidual(text.roll(1, 0), 20.0, training=EpochRecipe(epochs=60, batch_size=8, lr=0.2))
    assert wrong.score(features[0], labels) < 0.5
    assert wrong.fit(features, labels).score(features[0], labels) == 1.0


def test_fewer_images_than_a_batch_are_one_batch_and_none_are_no_step() -> None:
    recipe = EpochRecipe(epochs=2, batch_size=256, lr=0.1)
    assert [recipe.batches(images) for images in (0, 1, 255, 256, 511, 512)] == [0, 1, 1, 1, 1, 2]
    text, features, labels = problem()
    empty = TaskResidual(text, training=recipe).fit(features[:, :0], labels[:0])
    assert not empty.get_buffer("residual").any()
    assert warm_cosine(0, 2, 1.0, 0, 1e-5) == 1.0 and warm_cosine(1, 2, 1.0, 0, 1e-5) == pytest.approx(0.5)


# -- linear probe -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("c", [0.01, 0.316, 100.0])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_probe_is_scikit_learn_s(c: float, normalised: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    text, features, labels = problem(noise=1.0)
    rows = F.normalize(features[0], dim=-1) if normalised else features[0]
    theirs = linear_model.LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(rows.numpy(), labels.numpy())
    best = float(penalised_loss(*(torch.from_numpy(own) for own in (theirs.coef_, theirs.intercept_)), rows, labels, c))
    exact = LinearProbe(text, c=c, normalised=normalised)
    exact.tolerance = 1e-8
    exact.fit(features, labels)
    expected = torch.from_numpy(theirs.decision_function(rows.numpy()))
    torch.testing.assert_close(exact.logits(features[0]), expected, rtol=1e-3, atol=2e-3)
    quick = LinearProbe(text, c=c, normalised=normalised).fit(features, labels)
    found = float(penalised_loss(quick.get_buffer("weight"), quick.get_buffer("bias"), rows, labels, c))
    assert best - 1e-9 <= found <= best + 1e-3


def test_the_probe_is_a_minimum() -> None:
    text, features, labels = problem(noise=1.0)
    rows = F.normalize(features[0], dim=-1)
    probe = LinearProbe(text, c=2.0, normalised=True).fit(features, labels)
    weight, bias = probe.get_buffer("weight"), probe.get_buffer("bias")
    error = (rows @ weight.t() + bias).softmax(dim=-1) - F.one_hot(labels, C)
    assert float((error.t() @ rows / N + weight / (2.0 * N)).abs().max()) <= 1e-4
    assert float(error.mean(dim=0).abs().max()) <= 1e-4


def test_views_count_as_images_and_raw_features_count_by_their_length() -> None:
    text, views, labels = problem(noise=1.0, views=2)
    twice = LinearProbe(text, c=1.0, normalised=True).fit(views, labels)
    flat = LinearProbe(text, c=1.0, normalised=True).fit(views.flatten(0, 1), labels.repeat(2))
    assert torch.equal(twice.logits(views[0]), flat.logits(views[0]))
    raw = LinearProbe(text).fit(views[0], labels)
    assert not torch.allclose(raw.logits(views[0]), raw.logits(2 * views[0]))
    torch.testing.assert_close(twice.logits(views[0]), twice.logits(2 * views[0]))


def test_the_zero_shot_start_counts_only_as_far_as_the_minimum_is_not_reached() -> None:
    text, features, labels = problem(noise=1.0)

    def fitted(start: Literal["zero", "zeroshot"], iterations: int) -> Tensor:
        probe = LinearProbe(text, 20.0, c=1.0, normalised=True, start=start, iterations=iterations)
        return probe.fit(features, labels).logits(features[0]).softmax(dim=-1)

    torch.testing.assert_close(fitted("zeroshot", 1000), fitted("zero", 1000), rtol=0, atol=5e-3)
    assert float((fitted("zeroshot", 1) - fitted("zero", 1)).abs().max()) > 0.1


def test_c_is_chosen_on_validation_images() -> None:
    text, features, labels = problem(noise=1.0)
    val, truth = 2 * (text[labels] + 1.5 * normal(N, D, seed=5)), labels
    probe = LinearProbe(text).fit(features, labels, val=(val, truth))
    chosen = float(probe.get_buffer("c"))
    again = LinearProbe(text, c=chosen).fit(features, labels)
    torch.testing.assert_close(again.logits(val), probe.logits(val))
    coarse = [
        LinearProbe(text, c=10.0**one).fit(features, labels).score(val, truth) for one in (6, 4, 2, 0, -2, -4, -6)
    ]
    best = (6, 4, 2, 0, -2, -4, -6)[coarse.index(max(coarse))]
    assert abs(math.log10(chosen) - best) <= 1
    assert float(LinearProbe(text).fit(features, labels, val=(val[:0], truth[:0])).get_buffer("c")) == 0.316


def test_the_halving_search_asks_once_for_each_exponent() -> None:
    asked: list[float] = []

    def score(exponent: float) -> float:
        asked.append(exponent)
        return -abs(exponent - 2.3)

    assert search_exponent((6, 4, 2, 0), 8, score) == pytest.approx(2.3, abs=1e-2)
    assert (
        len(asked) == len(set(asked)) == 4 + 2 + 6
    )  # the grid, both ends, a middle at each later step but one on the grid
    assert search_exponent((6, 4, 2), 0, lambda exponent: 0.5) == 6  # of equals the first
    assert search_exponent((0,), 1, lambda exponent: 0.5) == -1  # then the lower end
    with pytest.raises(ConfigError, match="no exponents"):
        search_exponent((), 8, score)


# -- LP++ -------------------------------------------------------------------------------------------------------------
def reference(text: Tensor, features: Tensor, labels: Tensor, iterations: int, accumulate: bool, seed: int) -> Any:
    """Return w, b, alpha by autograd and torch's SGD, in the order of the official code."""
    t, f = F.normalize(text, dim=-1), F.normalize(features, dim=-1)
    w = torch.stack([f[labels == k].sum(dim=0) for k in range(C)]).requires_grad_()
    noise = torch.rand(C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b = (noise * 2 / math.sqrt(D) - 1 / math.sqrt(D)).requires_grad_()
    means = torch.stack([(f @ t.t())[labels == k, k].mean() for k in range(C)])
    alpha = (250 * means.mean() * torch.ones(C, dtype=torch.float64)).requires_grad_()
    rate = 4 * N / float(torch.linalg.svdvals(f).max() ** 2)
    alpha_rate = N / (4 * float((f @ t.t()).square().sum(dim=0).max()))
    optimizer = torch.optim.SGD([w, b], rate, momentum=0.9)
    for number in range(1, iterations + 1):
        optimizer.zero_grad()
        if not accumulate:
            alpha.grad = None
        F.cross_entropy(f @ w.t() + b + alpha * (f @ t.t()), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number % 10 == 0:
            alpha.data -= alpha_rate * alpha.grad
    return w.detach(), b.detach(), alpha.detach()


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("images", ["as they are", "turned around"])
def test_lp_plus_plus_takes_the_published_steps(accumulate: bool, images: str) -> None:
    text, features, labels = problem(noise=1.0)
    text = text if images == "as they are" else -text.roll(1, 0)
    cache = LPPlusPlus(text, iterations=35, accumulate=accumulate).fit(features, labels, seed=3)
    for name, value in zip(cache.fitted, reference(text, features[0], labels, 35, accumulate, 3), strict=True):
        torch.testing.assert_close(cache.get_buffer(name), value, rtol=1e-7, atol=1e-9)


def test_the_accumulated_gradient_is_another_step() -> None:
    text, features, labels = problem(noise=1.0)
    alphas = [
        LPPlusPlus(text, iterations=20, accumulate=one).fit(features, labels).get_buffer("alpha")
        for one in (True, False)
    ]
    assert not torch.allclose(*alphas)


def test_a_large_frozen_alpha_without_weights_is_zero_shot_s_choice() -> None:
    text, features, labels = problem(noise=1.5)
    cache = LPPlusPlus(text, 20.0)
    expected = cache.predict(features[0])
    cache.begin(cache.unit(features[0]), labels, 1)
    cache.weight = torch.zeros_like(cache.get_buffer("weight"))
    cache.alpha = torch.full((C,), 1e6, dtype=torch.float64)
    assert cache.is_fitted and torch.equal(cache.predict(features[0]), expected)


def test_the_loss_falls_at_every_step_below_the_bound_without_momentum() -> None:
    text, features, labels = problem(noise=1.0)
    cache = LPPlusPlus(text, iterations=50, momentum=0.0, alpha_every=1, accumulate=False)
    unit = cache.unit(features[0])
    # The bias is one more feature, of value 1, which the published bound leaves out: the bound of both is used.
    rate = 4 * N / float(torch.linalg.svdvals(torch.cat([unit, unit.new_ones(N, 1)], dim=1)).max() ** 2)
    cache.begin(unit, labels, 1)
    losses = list(cache.iterate(unit, labels, rate / 4, step_sizes(unit, cache.text)[1]))
    assert len(losses) == 50 and all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 0.1


def test_step_sizes_are_the_same_by_either_gram_matrix() -> None:
    unit, text = F.normalize(normal(40, 6), dim=-1), F.normalize(normal(3, 6, seed=2), dim=-1)
    wide = F.normalize(normal(4, 30), dim=-1)
    for rows, own in ((unit, text), (wide, F.normalize(normal(3, 30, seed=2), dim=-1))):
        rate, alpha_rate = step_sizes(rows, own)
        assert rate == pytest.approx(4 * len(rows) / float(torch.linalg.svdvals(rows).max()) ** 2)
        assert alpha_rate == pytest.approx(len(rows) / 4 / float((rows @ own.t()).square().sum(dim=0).max()))


def test_the_best_iteration_on_validation_images_is_kept_the_last_of_equals() -> None:
    text, features, labels = problem(noise=1.0)
    val, truth = 2 * (text[labels] + 1.5 * normal(N, D, seed=5)), labels
    cache = LPPlusPlus(text, iterations=40)
    unit = cache.unit(features[0])
    cache.begin(unit, labels, 1)
    scores, states = [], []
    for _ in cache.iterate(unit, labels, *step_sizes(unit, cache.text)):
        scores.append(cache.score(val, truth))
        states.append(cache.logits(val))
    best = max(place for place, one in enumerate(scores) if one == max(scores))
    kept = LPPlusPlus(text, iterations=40).fit(features, labels, val=(val, truth))
    torch.testing.assert_close(kept.logits(val), states[best])
    last = LPPlusPlus(text, iterations=40).fit(features, labels, val=(val[:0], truth[:0]))
    torch.testing.assert_close(last.logits(val), states[-1])


def test_a_class_without_images_starts_from_the_others_mean() -> None:
    text, features, labels = problem()
    here = labels != 2
    cache = LPPlusPlus(text, iterations=0).fit(features[:, here], labels[here])
    cosines = (F.normalize(features[0], dim=-1) * F.normalize(text, dim=-1)[labels]).sum(dim=-1)
    expected = 250 * torch.stack([cosines[labels == k].mean() for k in (0, 1, 3, 4)]).mean()
    cache.begin(cache.unit(features[0, here]), labels[here], 1)
    torch.testing.assert_close(cache.get_buffer("alpha"), expected.expand(C))
    assert not cache.get_buffer("weight")[2].any()


@pytest.mark.parametrize("kind", [LinearProbe, LPPlusPlus])
def test_no_images_are_refused(kind: type[nn.Module]) -> None:
    text, features, labels = problem()
    with pytest.raises(DataError, match="cannot be fitted on no images"):
        kind(text).fit(features[:, :0], labels[:0])  # type: ignore[operator]
