"""Caches on features: printed numbers of the specification, invariants of the papers, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.caches.ape import APE
from vlprompt.caches.base import FeatureClassifier, RowClassifier, class_sums
from vlprompt.caches.gda import GDA
from vlprompt.caches.linear_probe import LinearProbe
from vlprompt.caches.lp_plus_plus import LPPlusPlus
from vlprompt.caches.residual import TaskResidual
from vlprompt.caches.search import first_best, grid
from vlprompt.caches.tfup import TFUP
from vlprompt.caches.tfup_trained import Adaptation, TFUPTrained
from vlprompt.caches.tip_adapter import TipAdapter, TipAdapterF
from vlprompt.caches.training import CacheRecipe, EpochRecipe, orders
from vlprompt.errors import ConfigError, DataError

SHORT = CacheRecipe(epochs=2, batch_size=8, lr=1e-3, eps=1e-4, weight_decay=0.01)
WARM = Adaptation(warmup_epochs=1)
Make = Callable[[Tensor], Any]
#: Every cache with its number of epochs kept low.
CACHES: dict[str, Make] = {
    "tip_adapter": lambda text: TipAdapter(text, 20.0),
    "tip_adapter_f": lambda text: TipAdapterF(text, 20.0, training=SHORT),
    "ape": lambda text: APE(text, 20.0, channels=9),
    "gda": lambda text: GDA(text, 20.0),
    "taskres": lambda text: TaskResidual(text, 20.0, training=EpochRecipe(epochs=2, batch_size=8, lr=1e-3)),
    "linear_probe": lambda text: LinearProbe(text, 20.0, c=10.0, normalised=True),
    "lp_plus_plus": lambda text: LPPlusPlus(text, 20.0, iterations=12),
    "tfup": lambda text: TFUP(text, 20.0, cache_shots=3),
    "tfup_t": lambda text: TFUPTrained(text, 20.0, cache_shots=3, training=SHORT, adaptation=WARM),
}
every_cache = pytest.mark.parametrize("name", CACHES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(classes: int = 5, shots: int = 4, dim: int = 16, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unit text ``[C, D]``, raw features ``[V, N, D]`` that lie around it in mixed order, and labels ``[N]``."""
    text = F.normalize(normal(classes, dim), dim=-1)
    labels = torch.arange(classes).repeat(shots)
    return text, 7 * (text[labels] + 0.25 * normal(views, len(labels), dim, seed=1)), labels


@pytest.fixture(scope="module")
def appendix() -> dict[str, Tensor]:
    """The data of the specification's appendix A, in double precision."""

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    rng = np.random.RandomState(0)
    text = unit(rng.randn(7, 16))
    views = unit(unit(rng.randn(1, 16)) + 0.6 * unit(rng.randn(64, 16)))
    keys = unit(rng.randn(21, 16))
    more = unit(keys + 0.1 * rng.randn(21, 16))
    found = {"text": text, "query": views[:1], "keys": keys, "both": np.stack([keys, more])}
    return {name: torch.from_numpy(value) for name, value in found.items()} | {
        "labels": torch.arange(7).repeat_interleave(3)
    }


# -- printed numbers --------------------------------------------------------------------------------------------------
def printed(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-6)


def test_x6_tip_adapter(appendix: dict[str, Tensor]) -> None:
    cache = TipAdapter(appendix["text"], alpha=1.17, beta=5.5).fit(appendix["keys"], appendix["labels"])
    expected = (11.308229, -10.450312, -0.465011, -10.643048, 37.427952, -2.379991, 3.130944)
    printed(cache.logits(appendix["query"]), *expected)


def test_x7_tfup(appendix: dict[str, Tensor]) -> None:
    cache = TFUP(appendix["text"], alpha=0.3, beta=1.0, temperature=10.0)
    cache.keys, cache.labels = appendix["keys"], appendix["labels"].double()
    expected = (11.643167, -10.107846, -0.084412, -10.353809, 37.784648, -2.096859, 3.431443)
    printed(cache.logits(appendix["query"]), *expected)


def test_x8_gda(appendix: dict[str, Tensor]) -> None:
    cache = GDA(appendix["text"], alpha=1.0).fit(appendix["both"], appendix["labels"])
    expected = (8.106075, -13.245392, -4.372177, -19.604509, 34.907438, -7.219205, -1.908861)
    printed(cache.logits(appendix["query"]), *expected)


# -- every cache ------------------------------------------------------------------------------------------------------
def fitted(name: str, views: int = 1) -> tuple[Any, Tensor, Tensor]:
    """A fitted cache, raw features ``[M, D]`` of other images, and their labels."""
    text, features, labels = problem(views=views)
    cache = CACHES[name](text)
    cache.fit(features[0] if name.startswith("tfup") else features, labels)
    return cache, 3 * (text[labels] + 0.3 * normal(len(labels), 16, seed=5)), labels


@every_cache
def test_unfitted_is_zero_shot(name: str) -> None:
    text, features, _ = problem()
    cache = CACHES[name](text)
    assert not cache.is_fitted
    expected = 20 * F.normalize(features[0], dim=-1) @ text.t()
    torch.testing.assert_close(cache.logits(features[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CACHES if name not in ("taskres", "linear_probe", "lp_plus_plus")])
def test_alpha_zero_is_zero_shot(name: str) -> None:
    cache, features, _ = fitted(name)
    if name == "tfup_t":  # its null setting is an adapter and a residual that do nothing
        changed = Adaptation(text_ratio=0.0, image_ratio=0.0, use_cache=True)
        cache.settings = replace(cache.settings, adaptation=changed)
    cache.alpha.zero_()
    assert cache.is_fitted
    torch.testing.assert_close(cache.logits(features), cache.zeroshot(cache.unit(features)), rtol=1e-5, atol=1e-5)


@every_cache
def test_it_fits_predicts_and_scores(name: str) -> None:
    cache, features, labels = fitted(name)
    assert cache.logits(features).shape == (20, 5) and bool(cache.logits(features).isfinite().all())
    assert torch.equal(cache.predict(features), cache.logits(features).argmax(dim=-1))
    assert cache.score(features, labels) == float((cache.predict(features) == labels).double().mean()) > 0.5
    with pytest.raises(DataError, match="no images to score"):
        cache.score(features[:0], labels[:0])
    assert cache.logits(features[:0]).shape == (0, 5)


@every_cache
def test_the_length_of_features_does_not_count_and_images_are_alone(name: str) -> None:
    cache, features, _ = fitted(name)
    together = cache.logits(features)
    torch.testing.assert_close(torch.cat([cache.logits(one[None]) for one in features]), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.logits(5 * features), together, rtol=1e-4, atol=1e-4)


@every_cache
def test_fitting_twice_gives_the_same_bits_and_the_state_makes_it_anew(name: str) -> None:
    first, features, _ = fitted(name)
    again, _, _ = fitted(name)
    assert torch.equal(first.logits(features), again.logits(features))
    fresh = CACHES[name](problem()[0])
    state = {key: first.get_buffer(key) for key in first.fitted}
    assert fresh.misfits(state) == []
    for key, value in state.items():
        setattr(fresh, key, value)
    assert torch.equal(fresh.logits(features), first.logits(features))


@every_cache
def test_classes_can_be_left_out_and_reordered(name: str) -> None:
    cache, features, _ = fitted(name)
    rows = [3, 0, 4]
    part = CACHES[name](problem()[0][rows])
    for key, value in cache.for_classes(rows).items():
        setattr(part, key, value)
    if name.startswith("tfup"):  # likeness is measured in the probabilities of all classes, which are others then
        assert len(part.keys) == 9 and torch.equal(part.key_labels, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
        assert part.misfits({key: part.get_buffer(key) for key in part.fitted}) == []
    else:
        torch.testing.assert_close(part.logits(features), cache.logits(features)[:, rows], rtol=1e-4, atol=1e-4)


@every_cache
def test_states_that_contradict_themselves_are_named(name: str) -> None:
    cache, _, _ = fitted(name)
    state = {key: cache.get_buffer(key) for key in cache.fitted}
    by_class = isinstance(cache, RowClassifier)
    rows, key = (cache.per_class[-1], cache.per_class[0]) if by_class else ("labels", "keys")
    assert cache.misfits({**state, rows: state[rows][:-1]})
    assert cache.misfits({**state, key: state[key][:, :-1]})
    if not by_class:
        assert any("classes" in text for text in cache.misfits({**state, "labels": state["labels"] + 1}))


@every_cache
def test_double_precision_is_kept(name: str) -> None:
    text, features, labels = problem()
    cache = CACHES[name](text.double()).fit(features[0], labels)
    assert all(cache.get_buffer(key).dtype == torch.float64 for key in cache.fitted)
    assert cache.logits(features[0].half()).dtype == torch.float64


@every_cache
def test_fitting_in_inference_mode_leaves_ordinary_tensors(name: str) -> None:
    text, features, labels = problem()
    with torch.inference_mode():
        cache = CACHES[name](text).fit(features[0], labels)
    assert not any(cache.get_buffer(key).is_inference() for key in cache.fitted)
    plain = CACHES[name](text).fit(features[0], labels)
    assert torch.equal(cache.logits(features[0]), plain.logits(features[0]))


@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f", "ape", "gda"])
def test_shapes_and_labels_are_checked(name: str) -> None:
    text, features, labels = problem()
    for wrong, own in (
        (features[0, :, :-1], labels),
        (features[0], labels[:-1]),
        (features[0], labels + 1),
        (features[0], labels - 1),
        (features[None], labels),
    ):
        with pytest.raises(DataError, match="accepted"):
            CACHES[name](text).fit(wrong, own)
    with pytest.raises(ConfigError, match="accepted"):
        FeatureClassifier(text[0])


# -- Tip-Adapter ------------------------------------------------------------------------------------------------------
def test_keys_are_normalised_means_and_the_order_of_shots_does_not_count() -> None:
    text, features, labels = problem(views=3)
    cache = TipAdapter(text).fit(features, labels)
    torch.testing.assert_close(cache.keys.norm(dim=-1), torch.ones(20))
    first = F.normalize(features[:, 0].mean(dim=0), dim=-1)
    torch.testing.assert_close(cache.keys[0], first)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    shuffled = TipAdapter(text).fit(features[:, order], labels[order])
    torch.testing.assert_close(shuffled.logits(features[0]), cache.logits(features[0]), rtol=1e-5, atol=1e-5)


def test_beta_zero_adds_the_same_to_every_class_and_large_beta_is_the_nearest_neighbour() -> None:
    text, features, labels = problem()
    query = normal(30, 16, seed=3)
    flat = TipAdapter(text, alpha=2.0, beta=0.0).fit(features, labels)
    torch.testing.assert_close(flat.logits(query), flat.zeroshot(flat.unit(query)) + 2.0 * 4, rtol=1e-5, atol=1e-5)
    sharp = TipAdapter(text.double(), alpha=1e12, beta=200.0).fit(features, labels)
    nearest = sharp.affinity(sharp.unit(query)).argmax(dim=0)
    near = sharp.affinity(sharp.unit(query)).amax(dim=0) > 0.8
    assert torch.equal(sharp.predict(query)[near], sharp.key_labels[nearest][near])


def test_a_class_without_shots_keeps_its_zero_shot_logits() -> None:
    text, features, labels = problem()
    some = labels != 4  # the last class: one-hot values that are as wide as the largest label would lose it
    cache = TipAdapter(text, 20.0).fit(features[:, some], labels[some])
    found, zeroshot = cache.logits(features[0]), cache.zeroshot(cache.unit(features[0]))
    assert torch.equal(found[:, 4], zeroshot[:, 4]) and not torch.equal(found[:, 0], zeroshot[:, 0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 3), st.booleans())
def test_grouped_sums_are_products_with_one_hot_values(labels: list[int], images: int, ordered: bool) -> None:
    own = torch.tensor(sorted(labels) if ordered else labels, dtype=torch.int64)
    values = normal(len(own), images, seed=len(labels)).double()
    torch.testing.assert_close(class_sums(values, own, 5), F.one_hot(own, 5).double().t() @ values)


def test_no_epochs_is_training_free_and_training_lowers_the_loss() -> None:
    text, features, labels = problem(views=4)
    plain = TipAdapter(text, 20.0).fit(features, labels)
    none = CacheRecipe(epochs=0, batch_size=8, lr=0.1, eps=1e-4, weight_decay=0.0)
    untrained = TipAdapterF(text, 20.0, training=none).fit(features, labels)
    assert torch.equal(untrained.logits(features[0]), plain.logits(features[0]))
    more = CacheRecipe(epochs=30, batch_size=8, lr=0.01, eps=1e-4, weight_decay=0.0)
    cache = TipAdapterF(text, 20.0, training=more)
    TipAdapter.fit(cache, features, labels)
    losses = [step.loss for step in cache.training_steps(features, labels, [torch.arange(20)] * 30)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_epochs_take_their_views_in_turn_and_seeds_their_orders() -> None:
    text, features, labels = problem(views=3)
    cache = TipAdapterF(text, 20.0, training=SHORT)
    TipAdapter.fit(cache, features, labels)
    order = [torch.arange(20)] * 4
    seen = {step.epoch: step.rows for step in cache.training_steps(features, labels, order) if step.ends_epoch}
    assert list(seen) == [0, 1, 2, 3] and seen[0].tolist() == [16, 17, 18, 19]
    both = [TipAdapterF(text, 20.0, training=SHORT).fit(features, labels, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(both[0].keys, both[2].keys) and not torch.equal(both[0].keys, both[1].keys)
    other = TipAdapterF(text, 20.0, training=SHORT).fit(features, labels, epoch_features=features[:1], seed=1)
    assert not torch.equal(other.keys, both[0].keys)


def test_the_best_epoch_on_validation_is_kept() -> None:
    text, features, labels = problem()
    wild = CacheRecipe(epochs=6, batch_size=20, lr=1.0, eps=1e-4, weight_decay=0.0)
    val = (text[labels] + 0.7 * normal(20, 16, seed=9), labels)
    chosen = TipAdapterF(text, 20.0, training=wild).fit(features, labels, val=val)
    replay = TipAdapterF(text, 20.0, training=wild)
    TipAdapter.fit(replay, features, labels)
    scores, keys = [], []
    for _ in replay.training_steps(features, labels, orders(20, 6, 1)):
        scores.append(replay.score(*val))
        keys.append(replay.keys)
    assert len(set(scores)) > 1, "a search in which all epochs are alike shows nothing"
    assert torch.equal(chosen.keys, keys[scores.index(max(scores))])


def test_training_an_empty_cache_is_refused() -> None:
    text, features, labels = problem()
    with pytest.raises(DataError, match="no keys to train"):
        next(TipAdapterF(text).training_steps(features, labels, []))


# -- the search -------------------------------------------------------------------------------------------------------
def test_the_grid_begins_at_a_tenth_and_leaves_its_end_out() -> None:
    betas, alphas = grid(7, 200), grid(3, 20)
    assert betas[0] == alphas[0] == 0.1
    assert betas[-1] == pytest.approx(6.9655) and alphas[-1] == pytest.approx(2.855)
    assert len(betas) == 200 and len(alphas) == 20
    with pytest.raises(ConfigError, match="1 or more"):
        grid(3, 0)


def naive(cache: Any, features: Tensor, labels: Tensor, *axes: list[float]) -> Tensor:
    """The accuracy of every grid point, each by a full pass through the cache."""
    found = torch.zeros([len(axis) for axis in axes], dtype=torch.float64)
    for place in np.ndindex(*found.shape):
        for name, axis, i in zip(("beta", "alpha", "gamma"), axes, place, strict=False):
            getattr(cache, name).fill_(axis[i])
        found[place] = cache.score(features, labels)
    return found


@pytest.mark.parametrize("name", ["tip_adapter", "tfup", "ape"])
def test_the_search_equals_the_loop_over_the_grid(name: str) -> None:
    text, features, labels = problem(classes=6, shots=3)
    cache = CACHES[name](text.double())
    cache.fit(features[0], labels)
    query, truth = normal(150, 16, seed=8).double(), torch.arange(150) % 6  # more than are compared at once
    axes = [grid(9, 5), grid(40, 6), *([grid(3, 4)] if name == "ape" else [])]
    found = cache.search(query, truth, *axes)
    expected = naive(copy.deepcopy(cache), query, truth, *axes)
    assert torch.equal(found.accuracy, expected)
    place = first_best(expected)
    assert list(found.values.values()) == [axis[i] for axis, i in zip(axes, place, strict=True)]
    assert [float(getattr(cache, key)) for key in found.values] == pytest.approx(list(found.values.values()))
    assert cache.score(query, truth) == found.best == float(expected.max())


def test_of_equals_the_first_counts() -> None:
    assert first_best(torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]])) == (0, 1)
    text, features, labels = problem()
    cache = TipAdapter(text, 1e6).fit(features, labels)  # nothing changes the zero-shot answer
    found = cache.search(features[0], labels, [3.0, 1.0], [2.0, 0.5])
    assert found.values == {"beta": 3.0, "alpha": 2.0} and found.accuracy.unique().numel() == 1


def test_ties_between_classes_go_to_the_first_as_argmax_has_it() -> None:
    text = torch.eye(3)[[0, 0, 1]]  # the first two classes are alike
    cache = TipAdapter(text, 10.0)
    cache.fit(torch.eye(3)[[2]], torch.tensor([2]))
    found = cache.search(torch.eye(3)[[0, 0]], torch.tensor([0, 1]), [1.0], [0.1])
    assert float(found.accuracy) == 0.5


def test_searches_that_cannot_be_are_refused() -> None:
    cache, features, labels = fitted("tip_adapter")
    with pytest.raises(DataError, match="no images to choose"):
        cache.search(features[:0], labels[:0], [1.0], [1.0])
    with pytest.raises(ConfigError, match="no values of alpha"):
        cache.search(features, labels, [1.0], [])
    gda, _, _ = fitted("gda")
    with pytest.raises(DataError, match="no images to choose"):
        gda.search(features[:0], labels[:0])
    with pytest.raises(ConfigError, match="no values of alpha"):
        gda.search(features, labels, [])
