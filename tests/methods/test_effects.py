"""Every setting of every method has an effect, is refused, or is named as without effect.

A setting is changed in a short training of the miniature CLIP. The trace of the training has what the method needs from
a run, its initial and trained tensors, its losses, rates and scores.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_every_method import VARIANTS
from vlprompt import create_method, list_methods
from vlprompt.backbone import Backbone
from vlprompt.config.effect import without_effect
from vlprompt.config.types import field_hints, is_dataclass, literals, make, over_defaults
from vlprompt.errors import VlpromptError
from vlprompt.methods import PromptMethod, get_method_class
from vlprompt.methods.episodic import ViewsMethod
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod

NAMES = ["cat", "annual crop-land", "aeroplane"]
STREAM = 24
#: Settings that keep the trainings short, or whose effect needs more than the defaults show here.
SHORT: Mapping[str, dict[str, Any]] = {
    "tip_adapter": {"search_steps": (6, 4), "views": 2},
    "tip_adapter_f": {"search_steps": (6, 4), "views": 2, "epoch_views": 3, "training": {"epochs": 3, "batch_size": 5}},
    "ape": {"search_steps": (4, 3, 2), "views": 2},
    "gda": {"views": 2},
    "tfup_t": {"training": {"epochs": 3, "batch_size": 7}, "adaptation": {"warmup_epochs": 1}, "views": 2},
    "taskres": {"views": 2, "training": {"epochs": 3, "batch_size": 5, "lr": 0.2}},
    "lp_plus_plus": {"iterations": 40},
    "tpt": {"crops": 7, "confidence": 0.5},
    "difftpt": {"crops": 4, "generated": 3, "confidence": 0.5},
    "promptalign": {"crops": 3, "confidence": 0.5},
    "zero": {"crops": 7, "confidence": 0.5},
    "mta": {"crops": 7},
    "visual_prompt": {"prompt_size": 8},
    "vpt": {"image_depth": 1},
    "upt": {"image_depth": 1},
    "promptkd": {"image_depth": 1},
    "ivlp": {"image_depth": 1, "text_depth": 1},
    "promptsrc": {
        **{"image_depth": 1, "text_depth": 1},
        "self_regularisation": {"templates": ("a photo-real {}.", "a drawing of a {}.")},
    },
    "maple": {"depth": 1},
    "restore": {"depth": 2, "shift_consistency": {"variant": "paper"}},
    "linear_probe": {"iterations": 5},
    "mocoop": {"templates": ("a photo-real {}.", "a drawing of a {}."), "groups": (1, 1), "top_k": 1},
    "ramt": {"threshold": 0.0099999},
}
#: Settings that divide the work, with the same result, and those that need a tower of more blocks than the miniature's.
WORK = {"images_at_once", "jacobian"}
LARGE = {("clip_lora", "position")}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods with their defaults, and with every switch of theirs turned."""
    for name in list_methods():
        yield name, {}
        for own in VARIANTS.get(name, []):
            yield name, own
        for key, value in switches(name):
            yield name, nested(key, value)


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` of the key ``a.b``."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key, the type and the value of every setting."""
    for name, hint in field_hints(type(section)).items():
        value = getattr(section, name)
        yield prefix + name, hint, value
        if is_dataclass(type(value)):
            yield from leaves(value, f"{prefix}{name}.")


def settings_of(name: str, own: Mapping[str, Any]) -> Any:
    kind = get_method_class(name).Settings
    return make(kind, over_defaults(kind, own, make(kind, SHORT.get(name, {}))))


def switches(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the other values of settings that choose: flags, words, and numbers that may be 0."""
    for key, hint, value in leaves(settings_of(name, {})):
        if isinstance(value, bool):
            yield key, not value
        elif choices := literals(hint):
            yield from ((key, choice) for choice in choices if choice != value)
        elif key.rpartition(".")[2] in ("context_init", "crops", "steps", "views", "epoch_views", "generated"):
            yield key, "a photo of a" if value == "" else type(value)()
        elif is_dataclass(type(value)):
            yield key, None


def others(key: str, hint: Any, value: Any) -> Iterator[Any]:
    """Yield other values of a setting."""
    last = key.rpartition(".")[2]
    if isinstance(value, bool):
        yield not value
    elif choices := literals(hint):
        yield from (choice for choice in choices if choice != value)
    elif isinstance(value, int):
        yield from (value + 1, value - 1, 2 * value + 2, value // 2, 0)
    elif isinstance(value, float):
        yield from (value / 2, 3 * value + 0.01, 0.0, 0.35, 1.0, 20 * value)
    elif last in ("template", "templates"):
        yield ("a drawing of the {}.",) if last == "templates" else "a drawing of the {}."
    elif last == "context_init":
        yield from ("one drawing of", "an image of the", "")
    elif isinstance(value, tuple) and value and all(type(item) in (int, float) for item in value):
        yield tuple(item + 1 for item in value)
        yield tuple(item / 2 if isinstance(item, float) else max(item // 2, 1) for item in value)
        yield (0.0, 1.0)
    elif isinstance(value, tuple):
        yield value[:1]
        yield value[1:]
    elif value is None or is_dataclass(type(value)):
        yield {} if value is None else None


def steps(method: PromptMethod, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Train over two epochs of two steps; yield losses and gradients."""
    groups = method.parameter_groups(0.02)
    optimizer = torch.optim.SGD(groups, lr=0.02) if groups else None
    for epoch in range(2):
        for rows in (slice(0, 6), slice(6, 12)):
            terms = method.losses(images[rows], labels[rows])
            yield torch.stack(list(terms.values())).detach()
            if optimizer is not None:
                optimizer.zero_grad()
                torch.stack(list(terms.values())).sum().backward()
                optimizer.step()
        method.epoch_end(epoch, 2)
    method.train_end()
    yield torch.tensor([group["lr"] for group in groups])


def shots_for(method: PromptMethod) -> FewShotFeatures:
    """Features around the classes' text features, as many views as the method asks for."""
    text, draw = method.cache.text, torch.Generator().manual_seed(4)  # type: ignore[union-attr]

    def around(labels: Tensor, *views: int) -> Tensor:
        return 3 * (text[labels] + 2 * torch.randn(*views, len(labels), 64, generator=draw))  # type: ignore[index]

    labels, truth, images = torch.arange(3).repeat(4), torch.arange(21) % 3, torch.arange(60) % 3
    needs = method.needs
    select = needs.select_on is not None
    return FewShotFeatures(
        train=around(labels, max(needs.fit_views, 1)),
        labels=labels,
        val=around(truth)[: 21 if select else 0],
        val_labels=truth[: 21 if select else 0],
        unlabelled=around(images),
        unlabelled_views=around(images, needs.unlabelled_views),
        seed=1,
    )


def inputs_of(method: PromptMethod, images: Tensor) -> Tensor:
    """The images or features that the method scores, in as many views as it asks for."""
    views = method.needs.test_views
    if views is None:
        return images
    stack = torch.stack([images[:4].roll(shift, 0) + 0.3 * shift for shift in range(views.count)], dim=1)
    return stack if method.needs.images else method.view_features(stack)  # type: ignore[operator]


def trace(backbone: Backbone, images: Tensor, name: str, settings: Any) -> list[Any]:
    """Return all that a run sees of a method with these settings."""
    torch.manual_seed(0)
    method = create_method(name, backbone, NAMES, **dataclasses.asdict(settings))
    needs, start = method.needs, {} if isinstance(method, FittedMethod) else method.trained_state()
    if needs.test_views is not None and not needs.test_views.crops:  # none to be mixed
        needs = dataclasses.replace(needs, test_views=dataclasses.replace(needs.test_views, augmix=False))
    found: list[Any] = [repr(needs), method.fitted, start, method.zero_shot_settings()]
    labels = torch.arange(len(images)) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(method, FittedMethod):
            shots = shots_for(method)
            method.fit(shots)
            found += [method.logits(shots.val), method.logits(shots.unlabelled)]
        else:
            found += list(steps(method.train(), images, labels))
        if isinstance(method, ViewsMethod):
            method.measure_source([images])
        found += [method.trained_state(), method.eval()(inputs_of(method, images))]
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("effects", STREAM, 64))


def idle_keys(backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the settings that change nothing, and those that are named as such but change something."""
    settings = settings_of(name, own)
    expected = trace(backbone, images, name, settings)
    named = {key.removeprefix("settings.") for key in without_effect(settings)}
    searched = set(settings.searched()) if hasattr(settings, "searched") else set()
    still, wrong = set(), set()
    for key, hint, value in leaves(settings):
        if key.rpartition(".")[2] in WORK or (name, key) in LARGE:
            continue
        if may_stay(name, key, settings):
            continue
        outcomes = []
        for other in itertools.islice(others(key, hint, value), 8):
            try:
                changed = settings_of(name, merged(own, nested(key, other)))
                if changed == settings:
                    continue
                outcomes.append(same(trace(backbone, images, name, changed), expected))
            except VlpromptError:
                continue
            if not outcomes[-1]:
                break
        if outcomes and all(outcomes):
            still.add(key)
        elif outcomes and key in named:
            wrong.add(key)
    known = named | searched
    return {key for key in still if not any(key == name or key.startswith(f"{name}.") for name in known)}, wrong


def may_stay(name: str, key: str, settings: Any) -> bool:
    """Return whether the effect of a setting depends on luck in so short a training."""
    if key.startswith("search_"):
        return bool(settings.search)  # a grid, whose best point may stay the same
    if name == "tfup_t":
        return settings.select_on != "last" and key.startswith("adaptation.")  # of epochs after the best one
    return key == "projected_gradient.strength"  # of gradients that contradict each other


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: one[key] for key in one if key not in other}
    for key, value in other.items():
        inner = isinstance(value, dict) and isinstance(one.get(key), Mapping)
        both[key] = merged(one[key], value) if inner else value
    return both


CASES = list(cases())


@pytest.mark.covering(rows="name")
@pytest.mark.parametrize(("name", "own"), CASES, ids=[f"{name}-{own or 'defaults'}" for name, own in CASES])
def test_every_setting_changes_something_or_is_named(
    tiny_backbone: Backbone, images: Tensor, name: str, own: Mapping[str, Any]
) -> None:
    try:
        trace(tiny_backbone, images, name, settings_of(name, own))
    except VlpromptError:
        assert own, "a method does not refuse its own defaults"
        pytest.skip("the method refuses these settings")
    assert idle_keys(tiny_backbone, images, name, own) == (set(), set())
