"""What every method must do; being registered is enough to be tested here, and ``VARIANTS`` adds settings.

Each method runs each check once, by turns with its defaults and with each of its variants; with ``--all-pairs`` each
check with all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method, list_methods
from vlprompt.backbone import Backbone
from vlprompt.errors import ClassNameError, ConfigError, HeadError
from vlprompt.methods import PromptMethod, get_method_class
from vlprompt.methods.episodic import ViewsMethod

NAMES = ["golden_retriever", "jack-o'-lantern", "Boeing 737-200", "annual crop land", "cat"]
NEW_NAMES = ["cat", "aeroplane", "sea_lake", "golden_retriever"]

# Settings beside the defaults that every check runs with. A method that is not named runs with its defaults.
VARIANTS: Mapping[str, list[dict[str, Any]]] = {
    "zeroshot": [{"ensemble": True}],
    "coop": [{"class_token_position": "middle", "context_length": 3}, {"context_init": "a photo of a"}],
    "cocoop": [{"context_init": "", "context_length": 3, "images_at_once": 2}],
    "kgcoop": [{"context_init": "", "context_length": 2, "class_token_position": "front"}],
    "prograd": [{"context_length": 6, "context_init": "template"}],
    "vpt": [{"image_depth": 1, "image_tokens": 2}],
    "visual_prompt": [{"shape": "fixed_patch", "prompt_size": 40}],
    "promptkd": [{"image_depth": 1, "temperature": 2.0, "weight": 10.0}],
    "upt": [{"variant": "paper", "width": 24, "context_length": 3}, {"image_depth": 1, "class_token_position": "end"}],
    "ivlp": [{"image_depth": 0, "text_depth": 2}, {"context_length": 5, "image_depth": 1, "text_depth": 1}],
    "maple": [{"depth": 1, "context_length": 3}],
    "dept_lowrank": [{"class_token_position": "middle", "dept_lowrank": {"reach": "end-of-text"}}],
    "promptsrc": [{"aggregation": None, "self_regularisation": {"image": 0.0}}],
    "restore": [{"surgery": None, "shift_consistency": {"variant": "paper"}}],
    "tip_adapter": [{"views": 0, "search": False}],
    "clip_adapter": [{"ratio": 0.6, "reduction": 2}],
    "linear_probe": [{"normalised": True, "search": False}],
    "tda": [{"negative": False, "positive_capacity": 1}],
    "tpt": [{"context_init": "a photo of a [CLS] there", "steps": 2}],
    "difftpt": [{"variant": "paper", "generated": 2}],
    "promptalign": [{"depth": 1, "context_length": 3}],
    "clip_lora": [{"encoder": "vision", "params": ["v", "o"], "rank": 4}, {"encoder": "text", "position": "bottom"}],
    "ramt": [{"side": "both", "candidates": "mlp", "penalty": 0.0}, {"side": "text", "gradient_dropout": None}],
    "apt_approximated": [{"image_tokens": 0, "per_head": True}],
    "mocoop": [
        {"tune_layer_norms": False, "context_counting": "tokens", "text_temperature": 100.0},
        {"text_correction": False, "top_k": 1},
    ],
}
#: What starts so that its first gradients are nothing but rounding: queries and keys of values that start at zero.
STILL: Mapping[str, set[str]] = {
    "ept": {f"decomposition.{part}" for part in ("query_in", "query_out", "key_in", "key_out", "value_in")}
}
CASES = [(name, own) for name in list_methods() for own in [{}, *VARIANTS.get(name, [])]]
IDS = [f"{name}-{'-'.join(map(str, own)) or 'defaults'}" for name, own in CASES]


def every_method(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check with every method."""
    return pytest.mark.covering(rows="name")(pytest.mark.parametrize(("name", "own"), CASES, ids=IDS)(check))


def make(backbone: Backbone, name: str, own: Mapping[str, Any], names: list[str] | None = None) -> PromptMethod:
    torch.manual_seed(0)
    return create_method(name, backbone, names or NAMES, **own)


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("every method", 6, 64))


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def steps(method: PromptMethod, images: Tensor, labels: Tensor, count: int, lr: float = 0.01) -> Iterator[float]:
    """Train by SGD; yield the loss before each step."""
    groups = method.parameter_groups(lr)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9) if groups else None
    for _ in range(count):
        loss = torch.stack(list(method.losses(images, labels).values())).sum()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield float(loss.detach())


def score(method: PromptMethod, inputs: Tensor) -> Tensor:
    """Return logits, of a stream's first images where scores depend on those before."""
    if isinstance(method, ViewsMethod):
        method.reset()
    return method(inputs)


def digest(backbone: Backbone) -> str:
    state = backbone.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


# -- learnables -----------------------------------------------------------------------------------------------------
@every_method
def test_training_changes_every_learnable_and_nothing_else(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    frozen, before = digest(tiny_backbone), method.trained_state()
    losses = list(steps(method.train(), images, LABELS, 3))
    assert len(losses) == 3 and all(loss >= 0 for loss in losses)
    after = method.trained_state()
    assert digest(tiny_backbone) == frozen
    learnables = {key: after[key] for key, _ in method.trainable_parameters()}
    unchanged = {key for key, value in learnables.items() if value.numel() and torch.equal(value, before[key])}
    assert unchanged <= STILL.get(name, set())


@every_method
def test_learnables_are_float32_and_none_is_the_backbones(
    tiny_backbone: Backbone, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    of_backbone = {id(parameter) for parameter in tiny_backbone.parameters()}
    shared_memory = {parameter.data_ptr() for parameter in tiny_backbone.parameters()}
    for _, parameter in method.trainable_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert id(parameter) not in of_backbone
        assert not parameter.numel() or parameter.data_ptr() not in shared_memory
    wants_gradient = {id(p) for p in method.parameters() if p.requires_grad}
    assert wants_gradient == {id(parameter) for _, parameter in method.trainable_parameters()}


@every_method
def test_parameter_groups_hold_every_learnable_once(tiny_backbone: Backbone, name: str, own: Mapping[str, Any]) -> None:
    method = make(tiny_backbone, name, own)
    groups = method.parameter_groups(0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for _, parameter in method.trainable_parameters()}
    assert all(0 <= group["lr"] <= 0.1 for group in groups)
    assert bool(groups) == bool(method.trainable_parameters())
    if not groups:
        assert set(method.trained_state()) == set(method.fitted)


@every_method
def test_state_goes_round_and_misfits_change_nothing(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    list(steps(method, images, LABELS, 1))
    state = method.trained_state()
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())
    torch.manual_seed(99)
    other = create_method(name, tiny_backbone, NAMES, **own)
    other.load_trained_state(state)
    assert torch.equal(score(other, images), score(method, images))
    with pytest.raises(HeadError, match="no_such_tensor"):
        other.load_trained_state({**state, "no_such_tensor": torch.zeros(1)})
    for key in list(state)[:2]:
        with pytest.raises(HeadError, match=f"{key}: shape"):
            other.load_trained_state({**state, key: torch.zeros(1, 2, 3)})
        with pytest.raises(HeadError, match=f"{key}: missing"):
            other.load_trained_state({k: v for k, v in state.items() if k != key})
    assert all(torch.equal(value, state[key]) for key, value in other.trained_state().items())
    # The state is a copy: writing into it leaves the method as it was.
    for value in state.values():
        value.zero_()
    assert torch.equal(score(other, images), score(method, images))


# -- scores -----------------------------------------------------------------------------------------------------------
@every_method
def test_images_and_their_features_give_the_same_logits(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    with torch.no_grad():
        features = method.image_features(images)
        logits = score(method, images)
        assert features.shape == (6, 64) and logits.shape == (6, 5)
        assert features.dtype == logits.dtype == torch.float32 and bool(logits.isfinite().all())
        assert torch.equal(score(method, features), logits)
        assert method.needs.online or torch.equal(method.logits(features), logits)
        if not method.needs.images:
            assert torch.equal(features, tiny_backbone.encode_image(images))


@every_method
def test_permuted_classes_permute_logits(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    list(steps(method, images, LABELS, 2))
    order = [3, 0, 4, 1, 2]
    permuted = method.with_classes([NAMES[i] for i in order])
    torch.testing.assert_close(score(permuted, images), score(method, images)[:, order], rtol=1e-4, atol=1e-4)


@every_method
def test_other_classes_keep_the_logits_of_shared_ones(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    list(steps(method, images, LABELS, 2))
    random_state = torch.random.get_rng_state()
    other = method.with_classes(NEW_NAMES)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert other.class_names == NEW_NAMES and method.class_names == NAMES
    assert type(other) is type(method) and other.settings == method.settings and other.training == method.training
    assert other.backbone is method.backbone
    logits, new = score(method, images), score(other, images)
    assert new.shape == (6, 4)
    shared = [(NAMES.index(n), NEW_NAMES.index(n)) for n in NEW_NAMES if n in NAMES]
    for old_at, new_at in shared:
        if not method.needs.online:  # what a stream remembers of an image depends on all classes
            torch.testing.assert_close(new[:, new_at], logits[:, old_at], rtol=1e-4, atol=1e-4)
    # The learnables are copies: training one leaves the other as it was.
    list(steps(other, images, LABELS % 4, 1))
    assert torch.equal(score(method, images), logits)


@every_method
def test_an_image_does_not_see_the_rest_of_its_batch(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    with torch.no_grad():
        together = score(method, images)
        if isinstance(method, ViewsMethod):
            method.reset()
        alone = torch.cat([method(image[None]) for image in images])  # a stream cut elsewhere
        assert method.logits(method.image_features(images)[:0]).shape == (0, 5)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@every_method
def test_text_features_are_unit_rows_that_give_the_logits(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        weights = method.text_features()
        features = method.image_features(images)
        exact = method.text_features(features)
        logits = method.logits(features)
    assert weights.shape == (5, 64)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(5))
    scaled = tiny_backbone.logit_scale * method.unit_image(features).detach()
    got = scaled @ exact.t() if exact.ndim == 2 else torch.einsum("bd,bcd->bc", scaled, exact)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)


@every_method
def test_objectives_get_text_features_of_the_declared_kind(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        features = method.image_features(images)
        shape = method.training_text_features(method.unit_image(features), features).shape
    leading = {"class": 0, "expert": 1, "image": 1}[method.text_features_per]
    assert len(shape) == 2 + leading and shape[-2:] == (5, method.class_dim)
    if method.text_features_per == "image":
        assert len(shape) == 3 and shape[0] == len(images)


@every_method
def test_one_class_and_repeated_classes_are_served(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    single = make(tiny_backbone, name, own, ["cat"])
    assert single(images).shape == (6, 1)
    assert all(bool(term.isfinite()) for term in single.losses(images, LABELS * 0).values())
    shared = {**own, "class_specific": False} if "class_specific" in own else own
    with pytest.warns(UserWarning, match="same tokens"):
        twice = make(tiny_backbone, name, shared, ["cat", "CAT"])
    with pytest.raises(ClassNameError, match="'cat': classes 0, 1"):
        make(tiny_backbone, name, shared, ["cat", "cat"])
    with torch.no_grad():
        logits = score(twice, images)
        if not twice.needs.online:  # a stream's cache holds an image under one class, whichever name it goes by
            torch.testing.assert_close(logits[:, 0], logits[:, 1], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def narrow_backbone(tiny_state_dict: Any) -> Backbone:
    return Backbone.from_state_dict(tiny_state_dict(), precision="bf16")


@every_method
def test_bf16_backbone_stays_near_float32(
    narrow_backbone: Backbone, tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    wide_method, method = make(tiny_backbone, name, own).eval(), make(narrow_backbone, name, own).eval()
    method.load_trained_state(wide_method.trained_state())
    logits = method(images)
    assert logits.dtype == torch.float32
    # Little more than half a unit where logits have a scale of 100.
    assert float((logits - wide_method(images)).detach().abs().max()) < 0.7 * float(tiny_backbone.logit_scale) / 100
    assert all(value.dtype == torch.float32 for value in method.trained_state().values())
    list(steps(method, images, LABELS, 1))
    assert bool(method(images).isfinite().all())


@every_method
def test_a_deep_copy_is_a_method_of_its_own(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own).eval()
    logits = score(method, images).detach()
    other = copy.deepcopy(method)
    assert torch.equal(score(other, images), logits)
    list(steps(other.train(), images, LABELS, 2))
    assert torch.equal(score(method, images), logits)
    assert not {p.data_ptr() for _, p in other.trainable_parameters() if p.numel()} & {
        p.data_ptr() for p in method.parameters()
    }


@pytest.mark.covering(rows="name")
@pytest.mark.parametrize("count", [100, 1000, 300])
@pytest.mark.parametrize("name", list_methods())
def test_up_to_a_thousand_classes_are_served(tiny_backbone: Backbone, images: Tensor, name: str, count: int) -> None:
    names = [f"kind {number}" for number in range(count)]
    method = make(tiny_backbone, name, {}, names).train()
    losses = list(steps(method, images[:2], torch.tensor([0, count - 1]), 1))
    with torch.no_grad():
        logits = score(method.eval(), images[:2])
    assert logits.shape == (2, count) and bool(logits.isfinite().all()) and losses[0] > 0


# -- training ---------------------------------------------------------------------------------------------------------
@every_method
def test_equal_seeds_give_equal_losses_and_weights(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    first, again = make(tiny_backbone, name, own), make(tiny_backbone, name, own)
    assert list(steps(first, images, LABELS, 3)) == list(steps(again, images, LABELS, 3))
    state = again.trained_state()
    assert all(torch.equal(value, state[key]) for key, value in first.trained_state().items())


@every_method
def test_eight_images_of_two_classes_can_be_learned_by_heart(
    tiny_backbone: Backbone, tiny_clip: Any, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own, ["cat", "annual crop land"])
    if not method.parameter_groups(0.05) or method.needs.unlabelled != "none":
        pytest.skip(f"{name} does not learn from labels by gradient steps")
    images = torch.from_numpy(tiny_clip.draw_images("by heart", 8, 64))
    labels = torch.tensor([0, 1] * 4)
    with torch.no_grad():
        features = method.image_features(images)
    # Features are computed once where the method says that it may.
    inputs = images if method.needs.images else features
    optimizer = torch.optim.SGD(method.parameter_groups(0.05), lr=0.05, momentum=0.9)
    for step in range(200):
        if step % 5 == 0 and torch.equal(method.eval()(inputs).argmax(dim=-1), labels):
            break
        optimizer.zero_grad()
        # Without regularisers: whether the learnables could, not whether they are let.
        torch.stack(list(method.terms(method.train().step(inputs, labels)).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in method.trainable_parameters()], 1.0)
        optimizer.step()
    assert torch.equal(method.eval()(images).argmax(dim=-1), labels)


@every_method
def test_labels_matter_unless_images_are_unlabelled(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method, other = make(tiny_backbone, name, own), make(tiny_backbone, name, own)
    same = list(steps(method, images, LABELS, 2)) == list(steps(other, images, (LABELS + 1) % 5, 2))
    assert same == (method.needs.unlabelled != "none" and bool(method.trainable_parameters()))


@every_method
def test_training_can_follow_evaluation_in_inference_mode(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    with torch.inference_mode():
        method(images)
        method.losses(images, LABELS)
    assert len(list(steps(method, images, LABELS, 1))) == 1


@every_method
def test_losses_are_named_finite_scalars(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    method = make(tiny_backbone, name, own)
    terms = method.losses(images, LABELS)
    assert terms and all(isinstance(key, str) and term.shape == () and term.isfinite() for key, term in terms.items())
    labelled = method.needs.unlabelled == "none" or not method.trainable_parameters()
    assert ("ce" in terms) == labelled
    if labelled:
        scores = method.logits(method.image_features(images)) if method.needs.online else method(images)
        torch.testing.assert_close(terms["ce"], F.cross_entropy(scores, LABELS), rtol=1e-4, atol=1e-5)


# -- settings and names -----------------------------------------------------------------------------------------------
@every_method
def test_settings_can_be_written_down_and_read_back(tiny_backbone: Backbone, name: str, own: Mapping[str, Any]) -> None:
    import json

    method = make(tiny_backbone, name, own)
    again = make(tiny_backbone, name, json.loads(json.dumps(method.settings_dict())))
    assert [(key, value.shape) for key, value in again.trainable_parameters()] == [
        (k, v.shape) for k, v in method.trainable_parameters()
    ]


@pytest.mark.parametrize("name", list_methods())
def test_an_unknown_setting_is_named_with_its_neighbour(tiny_backbone: Backbone, name: str) -> None:
    known = list(get_method_class(name).Settings.__dataclass_fields__)
    with pytest.raises(ConfigError, match=f"{known[0]}z") as caught:
        create_method(name, tiny_backbone, NAMES, **{f"{known[0]}z": 1})
    assert f"'settings.{known[0]}'" in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", list_methods())
def test_values_of_a_wrong_type_are_refused_for_every_setting(tiny_backbone: Backbone, name: str) -> None:
    for key in get_method_class(name).Settings.__dataclass_fields__:
        for value in (object(), {"a": 1}, b"bytes", 1j, [[1]], float("nan")):
            with pytest.raises(ConfigError, match=f"settings.{key}"):
                create_method(name, tiny_backbone, NAMES, **{key: value})


@pytest.mark.parametrize("name", list_methods())
def test_all_wrong_types_are_reported_at_once(tiny_backbone: Backbone, name: str) -> None:
    keys = [field.name for field in dataclasses.fields(get_method_class(name).Settings)]
    with pytest.raises(ConfigError) as caught:
        create_method(name, tiny_backbone, NAMES, **dict.fromkeys(keys, object()))
    assert all(f"settings.{key} " in str(caught.value) for key in keys)


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize(
    "names", ["cat", [], None, 5, ["cat", ""], ["cat", "  "], ["_"], ["cat", 3], ["a\nb"], ["cat", "x " * 90]], ids=repr
)
def test_names_that_make_no_prompt_are_refused(tiny_backbone: Backbone, name: str, names: Any) -> None:
    with pytest.raises(ClassNameError) as caught:
        create_method(name, tiny_backbone, names)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", list_methods())
def test_all_class_names_must_begin_with_the_classes(tiny_backbone: Backbone, name: str) -> None:
    with pytest.raises(ClassNameError, match="must begin with class_names"):
        create_method(name, tiny_backbone, ["cat", "dog"], all_class_names=["dog", "cat", "bird"])
    method = create_method(name, tiny_backbone, ["cat", "dog"], all_class_names=["cat", "dog", "bird"])
    assert method.all_class_names == ["cat", "dog", "bird"] and method.class_names == ["cat", "dog"]
