"""APE's channels and weights, and GDA's Gaussians."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.caches.ape import APE
from vlprompt.caches.gda import GDA
from vlprompt.caches.tip_adapter import TipAdapter
from vlprompt.errors import ConfigError, DataError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(classes: int = 5, shots: int = 4, dim: int = 16, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unit text ``[C, D]``, raw features ``[V, N, D]`` that lie around it in mixed order, and labels ``[N]``."""
    text = F.normalize(normal(classes, dim), dim=-1)
    labels = torch.arange(classes).repeat(shots)
    return text, 7 * (text[labels] + 0.25 * normal(views, len(labels), dim, seed=1)), labels


def test_ape_on_all_channels_with_gamma_zero_is_tip_adapter() -> None:
    text, features, labels = problem(views=2)
    query = normal(10, 16, seed=3)
    ape = APE(text, 20.0, channels=16, alpha=1.3, beta=2.0, gamma=0.0).fit(features, labels)
    tip = TipAdapter(text, 20.0, alpha=1.3, beta=2.0).fit(features, labels)
    torch.testing.assert_close(ape.logits(query), tip.logits(query), rtol=1e-5, atol=1e-5)


def test_ape_s_closed_form_is_the_loop_over_pairs() -> None:
    text, features, labels = problem(classes=3, shots=2, dim=6)
    keys = F.normalize(features[0], dim=-1)
    order = labels.argsort(stable=True)
    cache = APE(text, channels=4)
    rows = [[text[c], *keys[labels == c]] for c in range(3)]
    pairs = [x * y for i in range(3) for j in range(3) if i != j for x in rows[i] for y in rows[j]]
    assert len(pairs) == 3 * 2 * 3**2
    expected = -0.7 * torch.stack(pairs).mean(dim=0) + 0.3 * text.var(dim=0)
    found = cache.channel_scores(keys[order], labels[order])
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-6)
    cache.fit(features, labels)
    assert set(cache.channels.int().tolist()) == set(expected.topk(4).indices.tolist())
    torch.testing.assert_close(cache.keys.norm(dim=-1), torch.ones(6))


def test_ape_s_divergence_is_that_of_the_one_hot_value() -> None:
    text, features, labels = problem()
    cache = APE(text, channels=9).fit(features, labels)
    p = (cache.keys @ F.normalize(text[:, cache.channels.long()], dim=-1).t()).softmax(dim=-1)
    value = F.one_hot(cache.key_labels, 5).float()
    expected = (value * ((value + 1e-6) / (p + 1e-6)).log2()).sum(dim=-1)
    torch.testing.assert_close(cache.divergence, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [17, -1])
def test_ape_cannot_keep_more_channels_than_there_are(channels: int) -> None:
    with pytest.raises(ConfigError, match=f"settings.channels is {channels}; accepted"):
        APE(problem()[0], channels=channels)
    one = APE(problem()[0][:1], channels=3).fit(torch.ones(2, 16), torch.zeros(2, dtype=torch.int64))
    assert bool(one.logits(torch.ones(1, 16)).isfinite().all())


def test_gda_is_invariant_under_rotations_of_the_features() -> None:
    text, features, labels = problem(views=2)
    turn = torch.linalg.qr(normal(16, 16, seed=4).double()).Q
    query = normal(9, 16, seed=6).double()
    plain = GDA(text.double()).fit(features, labels)
    turned = GDA(text.double() @ turn).fit(features.double() @ turn, labels)
    torch.testing.assert_close(turned.logits(query @ turn), plain.logits(query), rtol=1e-8, atol=1e-8)


def test_gda_with_an_isotropic_covariance_is_the_nearest_mean() -> None:
    # Every class has its mean shifted along every axis, both ways: the scatter is a multiple of the identity. Unit
    # length is left out of the way by fitting on what is normalised already.
    dim, step = 6, 1e-3
    means = F.normalize(normal(3, dim).double(), dim=-1)
    offsets = step * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    features = (means[:, None] + offsets).flatten(0, 1)
    labels = torch.arange(3).repeat_interleave(2 * dim)
    cache = GDA(means)
    cache.unit = lambda rows: rows.double()  # type: ignore[method-assign]
    cache.fit(features, labels)
    query = normal(50, dim, seed=3).double()
    nearest = torch.cdist(query, means).argmin(dim=-1)
    assert torch.equal(cache.gaussian(query).argmax(dim=-1), nearest)


def test_gda_needs_images_of_every_class_and_one_of_each_is_enough() -> None:
    text, features, labels = problem()
    with pytest.raises(DataError, match="1 of 5 classes have no images .the first is class 2"):
        GDA(text).fit(features[:, labels != 2], labels[labels != 2])
    one = GDA(text).fit(features[0, :5], labels[:5])  # no scatter within classes at all
    assert bool(one.logits(features[0]).isfinite().all())


def test_gda_s_search_is_that_of_the_loop() -> None:
    text, views, labels = problem()
    cache, features = GDA(text, 20.0).fit(views, labels), 3 * (text[labels] + 0.3 * normal(20, 16, seed=5))
    noisy = features + 4 * normal(20, 16, seed=11)
    scores = []
    values = [10.0**k for k in range(-4, 3)]
    for alpha in values:
        cache.alpha.fill_(alpha)
        scores.append(cache.score(noisy, labels))
    found = cache.search(noisy, labels)
    assert found.accuracy.tolist() == scores and found.values["alpha"] == values[scores.index(max(scores))]
