"""The cache methods in the registry: what they ask a run for, fit, save, and say where they use test images."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method, load_head
from vlprompt.backbone import Backbone
from vlprompt.caches.ape import APE
from vlprompt.caches.base import RowClassifier
from vlprompt.caches.tip_adapter import TipAdapter
from vlprompt.errors import ClassNameError, ConfigError, HeadError
from vlprompt.io.head import Head
from vlprompt.methods import PromptMethod
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.prompts.words import rows_of
from vlprompt.prompts.zero_shot import mean_features
from vlprompt.runs.session import use_of_test_images

NAMES = ["cat", "annual crop land", "aeroplane"]
#: Settings that keep the tests short.
SMALL: dict[str, dict[str, Any]] = {
    "tip_adapter": {"search_steps": (6, 4)},
    "tip_adapter_f": {"search_steps": (6, 4), "views": 2, "epoch_views": 3, "training": {"epochs": 3, "batch_size": 5}},
    "ape": {"search_steps": (4, 3, 2)},
    "gda": {},
    "tfup": {},
    "tfup_t": {"training": {"epochs": 3}, "adaptation": {"warmup_epochs": 1}, "views": 2},
    "taskres": {"views": 2, "training": {"epochs": 3, "batch_size": 5, "lr": 0.2}},
    "linear_probe": {},
    "lp_plus_plus": {"iterations": 20},
}
#: Linear classifiers of their own beside the caches, which add to the zero-shot one.
LINEAR = ("taskres", "linear_probe", "lp_plus_plus")
every_cache = pytest.mark.parametrize("name", SMALL)
every_sum = pytest.mark.parametrize("name", [name for name in SMALL if name not in LINEAR])


def make(backbone: Backbone, name: str, **own: Any) -> PromptMethod:
    return create_method(name, backbone, NAMES, **{**SMALL[name], **own})


def shots_for(method: PromptMethod, seed: int = 1, val: int = 9) -> FewShotFeatures:
    """Features that lie around the classes' text features, as many views as the method asks for."""
    text, draw = method.cache.text, torch.Generator().manual_seed(4)  # type: ignore[union-attr]

    def around(labels: Tensor, *views: int) -> Tensor:
        return 3 * (text[labels] + 0.1 * torch.randn(*views, len(labels), 64, generator=draw))  # type: ignore[index]

    labels, truth = torch.arange(3).repeat(4), torch.arange(val) % 3
    images = torch.arange(30) % 3
    return FewShotFeatures(
        train=around(labels, max(method.needs.fit_views, 1)),
        labels=labels,
        val=around(truth),
        val_labels=truth,
        unlabelled=around(images),
        unlabelled_views=around(images, method.needs.unlabelled_views),
        seed=seed,
    )


def fitted(backbone: Backbone, name: str, **own: Any) -> tuple[PromptMethod, FewShotFeatures]:
    method = make(backbone, name, **own)
    shots = shots_for(method)
    method.fit(shots)
    return method, shots


@every_cache
def test_unfitted_is_zero_shot(tiny_backbone: Backbone, tiny_clip: Any, name: str) -> None:
    images = torch.from_numpy(tiny_clip.draw_images("caches", 3, 64))
    expected = create_method("zeroshot", tiny_backbone, NAMES)(images)
    torch.testing.assert_close(make(tiny_backbone, name)(images), expected, rtol=1e-5, atol=1e-4)


@every_sum
def test_alpha_zero_is_zero_shot(tiny_backbone: Backbone, name: str) -> None:
    silent = {"adaptation": {"warmup_epochs": 1, "text_ratio": 0.0, "image_ratio": 0.0, "use_cache": True}}
    own = silent if name == "tfup_t" else {}
    own |= {} if name.startswith("tfup") else {"search": False}
    method, shots = fitted(tiny_backbone, name, alpha=0.0, **own)
    expected = create_method("zeroshot", tiny_backbone, NAMES)(shots.val)
    torch.testing.assert_close(method(shots.val), expected, rtol=1e-5, atol=1e-4)


@every_cache
def test_fitting_depends_on_the_shots_and_their_seed_alone(tiny_backbone: Backbone, name: str) -> None:
    method, shots = fitted(tiny_backbone, name)
    torch.manual_seed(12345)
    again = make(tiny_backbone, name)
    again.fit(shots)
    assert method.trained_state().keys() == set(method.fitted)
    for key, value in again.trained_state().items():
        assert value.dtype == torch.float32 and torch.equal(value, method.trained_state()[key])
    assert bool((method(shots.val).argmax(-1) == shots.val_labels).double().mean() > 0.6)
    if name in ("tip_adapter_f", "tfup_t"):
        other = make(tiny_backbone, name)
        other.fit(shots_for(other, seed=2))
        assert not torch.equal(other(shots.val), method(shots.val))


@every_cache
def test_a_saved_head_gives_the_same_logits(tiny_backbone: Backbone, name: str, tmp_path: Path) -> None:
    method, shots = fitted(tiny_backbone, name)
    folder = Head(method).save_pretrained(tmp_path / "head")
    assert torch.equal(load_head(folder, tiny_backbone)(shots.val), method(shots.val))


@every_cache
def test_a_state_that_contradicts_itself_changes_nothing(tiny_backbone: Backbone, name: str) -> None:
    method, shots = fitted(tiny_backbone, name)
    before, state = method(shots.val), method.trained_state()
    cache = method.cache
    key = f"cache.{cache.per_class[-1] if isinstance(cache, RowClassifier) else 'labels'}"
    with pytest.raises(HeadError, match="do not fit the method"):
        method.load_trained_state({**state, key: state[key][:-1]})
    with pytest.raises(HeadError, match=f"{key}: missing"):
        method.load_trained_state({k: v for k, v in state.items() if k != key})
    assert torch.equal(method(shots.val), before)
    fewer = create_method(name, tiny_backbone, NAMES[:2], **SMALL[name])
    with pytest.raises(HeadError, match="do not fit the method"):
        fewer.load_trained_state(state)


@every_cache
def test_own_classes_in_any_order_and_no_others(tiny_backbone: Backbone, name: str) -> None:
    method, shots = fitted(tiny_backbone, name)
    order = [2, 0, 1]
    moved = method.with_classes([NAMES[i] for i in order])
    torch.testing.assert_close(moved(shots.val), method(shots.val)[:, order], rtol=1e-4, atol=1e-4)
    part = method.with_classes([NAMES[2], NAMES[0]])
    assert part(shots.val).shape == (9, 2) and part.training == method.training
    if not name.startswith("tfup"):  # whose likeness is measured in the probabilities of all classes
        torch.testing.assert_close(part(shots.val), method(shots.val)[:, [2, 0]], rtol=1e-4, atol=1e-4)
    with pytest.raises(ClassNameError, match=f"{name} was fitted on images of its 3 classes.*'dog'"):
        method.with_classes(["cat", "dog"])


def test_repeated_names_are_taken_in_turn() -> None:
    assert rows_of(["a", "b", "a"], ["a", "a", "b", "a"]) == [0, 2, 1, 2]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "taskres"])  # whose rows are the whole classifier
def test_text_features_are_zero_shot_s_and_a_fitted_cache_warns(tiny_backbone: Backbone, name: str) -> None:
    method, _ = fitted(tiny_backbone, name)
    with pytest.warns(UserWarning, match=f"{name} is fitted and scores by more than text features"):
        weights = method.text_features()
    torch.testing.assert_close(weights, create_method("zeroshot", tiny_backbone, NAMES).text_features())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tiny_backbone, name).text_features()


@every_cache
def test_no_objective_goes_with_a_cache(tiny_backbone: Backbone, name: str) -> None:
    with pytest.raises(ConfigError, match=f"objective 'knowledge' cannot go with method '{name}'"):
        create_method(name, tiny_backbone, NAMES, objectives={"knowledge": {}})


# -- what a run is asked for ------------------------------------------------------------------------------------------
def test_the_views_that_are_asked_for(tiny_backbone: Backbone) -> None:
    def asked(name: str, **own: Any) -> tuple[int, str, str, int]:
        method = create_method(name, tiny_backbone, NAMES, **own)
        needs = method.needs
        return needs.fit_views, needs.fit_view, needs.unlabelled, needs.unlabelled_views

    assert asked("tip_adapter") == (10, "random-half", "none", 0)
    assert asked("tip_adapter", views=0) == (0, "random-half", "none", 0)
    assert asked("tip_adapter_f") == (30, "random-half", "none", 0)
    assert asked("tip_adapter_f", views=0, epoch_views=0) == (0, "random-half", "none", 0)
    assert asked("tip_adapter_f", views=0, epoch_views=5) == (6, "random-half", "none", 0)
    assert asked("taskres") == (20, "random", "none", 0) and asked("linear_probe")[0] == 0
    assert asked("lp_plus_plus") == (1, "random-half", "none", 0)
    assert asked("ape") == asked("gda") == (10, "random-half", "none", 0)
    assert asked("tfup")[::2] == (0, "train") and asked("tfup")[3] == 0
    assert asked("tfup_t")[::2] == (0, "train") and asked("tfup_t")[3] == 30


def test_test_images_are_used_only_where_settings_say_so(tiny_backbone: Backbone) -> None:
    for name in SMALL:
        method = make(tiny_backbone, name)
        assert isinstance(method, FittedMethod) and not method.parameter_groups(0.1)
        assert method.needs.select_on == (None if name in ("tfup", "tfup_t", "taskres") else "val")
        assert use_of_test_images(method) is None
        if name not in ("tfup", "taskres"):  # which choose nothing
            assert make(tiny_backbone, name, select_on="test").needs.select_on == "test"
    for name in ("tfup", "tfup_t"):
        method = make(tiny_backbone, name, unlabelled="test")
        assert method.needs.unlabelled == "test" and use_of_test_images(method) == "transductive"


def test_gda_s_crops_are_a_setting_of_its_own(tiny_backbone: Backbone) -> None:
    method = create_method("gda", tiny_backbone, NAMES, view="random")
    assert (method.needs.fit_views, method.needs.fit_view) == (10, "random")


def test_the_grids_of_the_searches_are_the_official_ones(tiny_backbone: Backbone, monkeypatch: Any) -> None:
    """APE's gammas begin at 0 (main.py, gamma_list), everything else at 0.1; the upper ends are never tried."""
    tried: dict[str, Any] = {}

    def search(self: Any, features: Tensor, labels: Tensor, *axes: Sequence[float]) -> None:
        tried[type(self).__name__] = axes

    monkeypatch.setattr(APE, "search", search)
    monkeypatch.setattr(TipAdapter, "search", search)
    for name, own in (("ape", {"search_beta": 10.0}), ("tip_adapter", {"search_alpha": 30.0})):
        method = create_method(name, tiny_backbone, NAMES, **own)
        method.fit(shots_for(method))
    betas, alphas, gammas = tried["APE"]
    assert list(gammas) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert list(alphas) == pytest.approx([0.1 + i * 6.9 / 20 for i in range(20)])
    assert list(betas) == pytest.approx([0.1 + i * 9.9 / 200 for i in range(200)])
    betas, alphas = tried["TipAdapter"]
    assert list(alphas) == pytest.approx([0.1 + i * 29.9 / 20 for i in range(20)])
    assert list(betas) == pytest.approx([0.1 + i * 6.9 / 200 for i in range(200)])


def test_the_linear_probe_is_fitted_on_raw_features(tiny_backbone: Backbone) -> None:
    """As by lpclip: the length of a feature counts, in fitting and in scoring."""
    method, shots = fitted(tiny_backbone, "linear_probe", search=False)
    bias = method(torch.zeros_like(shots.val))
    torch.testing.assert_close(method(2 * shots.val) - bias, 2 * (method(shots.val) - bias), rtol=1e-4, atol=1e-4)
    unit, _ = fitted(tiny_backbone, "linear_probe", search=False, normalised=True)
    torch.testing.assert_close(unit(2 * shots.val), unit(shots.val))
    assert not torch.allclose(unit(shots.val), method(shots.val))


@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f", "ape", "gda"])
def test_the_search_needs_validation_images(tiny_backbone: Backbone, name: str) -> None:
    method = make(tiny_backbone, name, alpha=0.37)
    method.fit(shots_for(method, val=0))
    assert float(method.cache.alpha) == pytest.approx(0.37)  # type: ignore[union-attr, arg-type]
    still = make(tiny_backbone, name, alpha=0.37, search=False)
    still.fit(shots_for(still))
    assert float(still.cache.alpha) == pytest.approx(0.37)  # type: ignore[union-attr, arg-type]
    searched, _ = fitted(tiny_backbone, name, alpha=0.37)
    assert float(searched.cache.alpha) != pytest.approx(0.37)  # type: ignore[union-attr, arg-type]


def test_tip_adapter_f_trains_on_the_views_behind_those_of_its_keys(tiny_backbone: Backbone) -> None:
    method = make(tiny_backbone, "tip_adapter_f", training={"epochs": 0}, search=False)
    shots = shots_for(method)
    method.fit(shots)
    order = shots.labels.argsort(stable=True)
    expected = F.normalize(shots.train[:2].mean(dim=0), dim=-1)[order]
    assert shots.train.shape[0] == 5 and torch.equal(method.cache.keys, expected)  # type: ignore[union-attr]
    trained, _ = fitted(tiny_backbone, "tip_adapter_f", search=False)
    keys = trained.cache.keys  # type: ignore[union-attr]
    assert not torch.equal(keys, expected)  # type: ignore[arg-type]


def test_tfup_keeps_the_last_epoch_unless_told_otherwise(tiny_backbone: Backbone) -> None:
    method, shots = fitted(tiny_backbone, "tfup_t")
    blind = make(tiny_backbone, "tfup_t")
    blind.fit(dataclasses.replace(shots, val=shots.val[:0], val_labels=shots.val_labels[:0]))
    assert torch.equal(blind(shots.val), method(shots.val))


def test_tfup_s_text_is_the_mean_of_raw_features(tiny_backbone: Backbone) -> None:
    templates = ["a photo of a {}.", "art of the {}."]
    method: Any = create_method("tfup_t", tiny_backbone, NAMES, templates=templates)
    prompts = [[template.format(name) for template in templates] for name in NAMES]
    raw = mean_features(tiny_backbone, prompts)
    torch.testing.assert_close(method.cache.raw_text, raw)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(method.cache.text, F.normalize(raw, dim=-1))
    with pytest.raises(ConfigError, match="class 1 has no prompts"):
        mean_features(tiny_backbone, [["a cat."], []])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tip_adapter", {"alpha": -1.0}),
        ("tip_adapter", {"views": -1}),
        ("tip_adapter", {"search_steps": (200,)}),
        ("tip_adapter", {"search_steps": (0, 20)}),
        ("tip_adapter", {"search_beta": 0.05}),
        ("tip_adapter", {"select_on": "train"}),
        ("tip_adapter", {"templates": ["no name"]}),
        ("tip_adapter_f", {"training": {"batch_size": 0}}),
        ("tip_adapter_f", {"training": {"lr": -0.1}}),
        ("ape", {"channels": 65}),
        ("ape", {"search_steps": (2, 2)}),
        ("gda", {"views": -2}),
        ("gda", {"view": "center"}),
        ("tfup", {"cache_shots": -1}),
        ("tfup", {"unlabelled": "val"}),
        ("tfup_t", {"adaptation": {"image_ratio": 1.5}}),
        ("tfup_t", {"adaptation": {"warmup_epochs": -1}}),
        ("taskres", {"alpha": -0.5}),
        ("taskres", {"training": {"batch_size": 0}}),
        ("linear_probe", {"c": 0.0}),
        ("linear_probe", {"start": "zeroshot"}),
        ("lp_plus_plus", {"momentum": 1.0}),
        ("lp_plus_plus", {"alpha_every": 0}),
        ("clip_adapter", {"ratio": 1.1}),
        ("clip_adapter", {"reduction": 0}),
    ],
    ids=repr,
)
def test_settings_that_cannot_be_are_named(tiny_backbone: Backbone, name: str, own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"settings.{next(iter(own))}.* is .*accepted"):
        create_method(name, tiny_backbone, NAMES, **own)
