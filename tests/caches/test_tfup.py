"""TFUP's selection and similarity, and the adapters of TFUP-T."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.caches.tfup import TFUP, cache_shots, candidate_divergence, kl_matrix, marginal_loss
from vlprompt.caches.tfup_trained import Adaptation, TFUPTrained
from vlprompt.caches.training import CacheRecipe, orders
from vlprompt.errors import DataError

SHORT = CacheRecipe(epochs=2, batch_size=8, lr=1e-3, eps=1e-4, weight_decay=0.01)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(classes: int = 5, shots: int = 4, dim: int = 16, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unit text ``[C, D]``, raw features ``[V, N, D]`` that lie around it in mixed order, and labels ``[N]``."""
    text = F.normalize(normal(classes, dim), dim=-1)
    labels = torch.arange(classes).repeat(shots)
    return text, 7 * (text[labels] + 0.25 * normal(views, len(labels), dim, seed=1)), labels


def trained(text: Tensor) -> TFUPTrained:
    """An empty cache that is trained for an epoch in each stage."""
    return TFUPTrained(text, 20.0, cache_shots=3, training=SHORT, adaptation=Adaptation(warmup_epochs=1))


def test_the_paper_s_numbers_of_shots() -> None:
    assert [cache_shots(images, 10) for images in (10, 300, 400, 500, 9000)] == [9, 9, 12, 15, 16]


def test_each_class_has_as_many_keys_and_no_more_than_there_are_images() -> None:
    text, features, _ = problem(classes=5, shots=12)
    cache = TFUP(text).fit(features[0])
    assert cache.keys.shape == (5 * 9, 16) and torch.equal(cache.key_labels, torch.arange(5).repeat_interleave(9))
    few = TFUP(text).fit(features[0, :3])
    assert few.keys.shape == (5 * 3, 16) and bool(few.logits(features[0]).isfinite().all())
    one = TFUP(text).fit(features[0, :1])
    assert one.keys.shape == (5, 16) and bool(one.logits(features[0]).isfinite().all())
    for wrong in (features, features[0, :0], features[0, :, 1:]):
        with pytest.raises(DataError, match="accepted"):
            TFUP(text).fit(wrong)


def test_selection_is_that_of_the_loops() -> None:
    text, features, _ = problem(classes=4, shots=10)
    cache = TFUP(text)
    q = cache.probabilities(cache.unit(features[0])).exp().double()
    for label, chosen in enumerate(cache.select(features[0], 5)):
        likely = q[:, label].argsort(descending=True)[:10].tolist()
        sums = {j: sum(float((q[j] * (q[j] / q[m]).log()).sum()) for m in likely) for j in likely}
        assert chosen.tolist() == sorted(likely, key=lambda j: sums[j])[:5]


def test_divergences_by_products_are_those_of_loops_and_survive_underflow() -> None:
    log = (3 * normal(6, 5)).log_softmax(dim=-1)
    other = (3 * normal(4, 5, seed=1)).log_softmax(dim=-1)
    loop = torch.stack([torch.stack([(p.exp() * (p - q)).sum() for q in other]) for p in log])
    torch.testing.assert_close(kl_matrix(log, other), loop, rtol=1e-4, atol=1e-5)
    own = torch.stack([torch.stack([(p.exp() * (p - q)).sum() for q in log]).sum() for p in log])
    torch.testing.assert_close(candidate_divergence(log).float(), own, rtol=1e-4, atol=1e-5)
    steep = (1e4 * normal(3, 5)).log_softmax(dim=-1)
    assert bool(kl_matrix(steep, steep).isfinite().all()) and bool(candidate_divergence(steep).isfinite().all())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 99))
def test_similarity_is_between_zero_and_two_and_two_for_the_nearest(keys: int, images: int, seed: int) -> None:
    cache = TFUP(F.normalize(normal(5, 16), dim=-1))
    log, key_log = (cache.probabilities(F.normalize(normal(n, 16, seed=seed + n), dim=-1)) for n in (images, keys + 7))
    found = cache.similarity(log, key_log[:keys])
    assert (
        found.shape == (keys, images)
        and float(found.min()) >= 0
        and torch.equal(found.amax(0), found.new_full((images,), 2.0))
    )
    # Standardising a row before its minimum and maximum are taken changes nothing.
    rows = kl_matrix(log, key_log[:keys])
    if keys > 1:
        z = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        span = z.amax(1, keepdim=True) - z.amin(1, keepdim=True)
        torch.testing.assert_close(2 * (1 - (z - z.amin(1, keepdim=True)) / span), found.t(), rtol=1e-3, atol=1e-3)


def test_streaming_and_constant_rows() -> None:
    cache = TFUP(F.normalize(normal(5, 16), dim=-1))
    log = cache.probabilities(F.normalize(normal(2, 16, seed=4), dim=-1))
    assert torch.equal(cache.similarity(log, log[:1].expand(3, -1)), torch.full((3, 2), 2.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.floats(0, 50))
def test_the_marginal_term_is_between_minus_ln_c_and_zero(images: int, classes: int, scale: float) -> None:
    found = float(marginal_loss(scale * normal(images, classes)))
    assert -float(np.log(classes)) - 1e-4 <= found <= 1e-4


def test_tfup_t_starts_at_zero_shot_where_the_second_layer_is_silent() -> None:
    text, features, _ = problem()
    cache = trained(text)
    TFUP.fit(cache, features[0])
    cache.begin(1)
    zeroshot = cache.zeroshot(cache.unit(features[0]))
    assert not torch.allclose(cache.logits(features[0]), zeroshot, atol=1e-2)
    cache.image_up.zero_()
    torch.testing.assert_close(cache.logits(features[0]), zeroshot, rtol=1e-5, atol=1e-5)


def test_tfup_t_s_first_values_are_linear_s_and_depend_on_the_seed_alone() -> None:
    cache = trained(F.normalize(normal(3, 64), dim=-1))
    cache.begin(1)
    down, up = cache.image_down, cache.image_up
    assert down.shape == (16, 64) and up.shape == (64, 16) and not cache.text_residual.any()
    assert float(down.abs().max()) <= 1 / 8 and float(up.abs().max()) <= 1 / 4 and float(down.abs().max()) > 0.12
    torch.manual_seed(77)
    cache.begin(1)
    assert torch.equal(cache.image_down, down)
    cache.begin(2)
    assert not torch.equal(cache.image_down, down)


def test_tfup_t_without_a_sure_label_is_still_finite() -> None:
    text, features, _ = problem()
    cache = TFUPTrained(text, 1e-3, cache_shots=3, training=SHORT, adaptation=Adaptation(warmup_epochs=0))
    cache.fit(features[0])
    assert all(bool(cache.get_buffer(name).isfinite().all()) for name in cache.fitted)


def test_tfup_t_s_views_validation_and_cache_count() -> None:
    text, features, labels = problem(views=3)
    plain, views = trained(text).fit(features[0]), trained(text)
    views.fit(features[0], views=features[1:])
    assert not torch.equal(plain.image_down, views.image_down)
    chosen = trained(text).fit(features[0], val=(features[0], labels))
    assert chosen.score(features[0], labels) >= plain.score(features[0], labels)
    with_cache = trained(text).fit(features[0])
    with_cache.settings = replace(with_cache.settings, adaptation=Adaptation(use_cache=True))
    assert not torch.allclose(with_cache.logits(features[0]), plain.logits(features[0]))


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 2), (10, 2), (20, 1), (21, 1), (64, 1)])
def test_tfup_t_drops_partial_batches_in_both_stages_and_in_its_schedule(batch_size: int, steps: int) -> None:
    """As Dassl's loader does: 20 images in batches of 8 are two steps, as the rates are."""
    text, features, _ = problem()
    cache = TFUPTrained(text, 20.0, cache_shots=3, adaptation=Adaptation(warmup_epochs=1))
    cache.settings = replace(cache.settings, training=replace(cache.settings.training, epochs=3, batch_size=batch_size))
    TFUP.fit(cache, features[0])
    cache.begin(1)
    warm, order = orders(20, 1, 1), orders(20, 2, 2)
    targets = torch.zeros(20, dtype=torch.int64)
    done = list(cache.training_steps(features[0], features, targets, features, warm, order))
    assert [step.epoch for step in done] == [epoch for epoch in range(3) for _ in range(steps)]
    assert [step.ends_epoch for step in done] == 3 * [*[False] * (steps - 1), True]
    assert all(len(step.rows) == min(batch_size, 20) for step in done)
    top, period = cache.settings.training.lr, 3 * steps
    expected = [top / 2 * (1 + np.cos(np.pi * number / period)) for number in range(period)]
    assert [step.lr for step in done] == pytest.approx(expected)
