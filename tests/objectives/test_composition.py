"""Objectives with methods they were not invented for; what cannot go together is refused with the reason."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method, list_methods, load_backbone
from vlprompt.backbone import Backbone
from vlprompt.config.types import validated
from vlprompt.errors import ConfigError
from vlprompt.methods import PromptMethod, get_method_class
from vlprompt.objectives import get_objective_class, list_objectives
from vlprompt.objectives.aggregation import gaussian_weights
from vlprompt.objectives.base import LACKING
from vlprompt.objectives.knowledge import KnowledgeSettings
from vlprompt.objectives.projection import project
from vlprompt.objectives.shift import feature_shift

NAMES = ["cat", "annual crop land", "aeroplane", "sea_lake"]
LABELS = torch.tensor([0, 1, 2, 3])


def impossible() -> dict[tuple[str, str], str]:
    """Pairs of which the method lacks what the objective declares to need, with the reason given."""
    backbone, reasons = load_backbone("demo"), {}
    for name in list_methods():
        if get_method_class(name).no_objectives:
            reasons |= {(name, objective): "no objective takes part in that" for objective in list_objectives()}
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = create_method(name, backbone, ["cat", "dog"])
        there = {
            "text": bool(method.training_layouts()),
            "image": method.needs.images,
            "deep": all(method.deep_prompts()) and method.deep_layers() > 0,
        }
        for objective in list_objectives():
            kind = get_objective_class(objective)
            lacking = [part for part in kind.needs(kind.Settings()) if not there[part]]
            if lacking:
                reasons[name, objective] = LACKING[lacking[0]]
    return reasons


IMPOSSIBLE = impossible()
#: Objectives that zero-shot takes and that bring nothing to train.
NOTHING_TRAINED = ("aggregation", "projected_gradient", "gradient_dropout")
LEFT_OUT = {*IMPOSSIBLE, *(("zeroshot", objective) for objective in NOTHING_TRAINED)}
PAIRS = [pair for pair in itertools.product(list_methods(), list_objectives()) if pair not in LEFT_OUT]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("composition", 4, 64))


def make(backbone: Backbone, name: str, **more: Any) -> PromptMethod:
    torch.manual_seed(0)
    return create_method(name, backbone, NAMES, **more)


def train(method: PromptMethod, images: Tensor, count: int = 2, lr: float = 0.01) -> list[float]:
    optimizer = torch.optim.SGD(method.parameter_groups(lr), lr=lr)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = torch.stack(list(method.losses(images, LABELS).values())).sum()
        loss.backward()
        assert all(p.grad is not None for _, p in method.trainable_parameters()), (
            "a learnable without gradient stops several processes"
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("name", "objective"), IMPOSSIBLE)
def test_a_pair_that_lacks_something_is_refused_with_the_reason(
    name: str, objective: str, tiny_backbone: Backbone
) -> None:
    with pytest.raises(ConfigError, match=f"objective '{objective}' cannot go with method '{name}'") as caught:
        make(tiny_backbone, name, objectives={objective: {}})
    assert IMPOSSIBLE[name, objective] in str(caught.value)


@pytest.mark.covering(rows="name", every=3)
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_every_other_pair_trains(name: str, objective: str, tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, name, objectives={objective: {}})
    assert len(train(method, images)) == 2
    method.epoch_end(0, 2)
    method.epoch_end(1, 2)
    method.train_end()
    other = method.with_classes(["cat", "dog"])
    with torch.no_grad():
        torch.testing.assert_close(other(images)[:, 0], method(images)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", NOTHING_TRAINED)
def test_nothing_is_added_where_nothing_is_trained(objective: str, tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "zeroshot", objectives={objective: {}})
    assert not method.trainable_parameters()
    assert torch.equal(method(images), make(tiny_backbone, "zeroshot")(images))


@pytest.mark.parametrize(
    ("name", "objectives", "terms"),
    [
        ("maple", {"self_regularisation": {}}, {"ce", "scl_text", "scl_image", "scl_logits"}),
        ("mocoop", {"knowledge": {"weight": 4.0}}, {"ce", "text", "gate", "knowledge"}),
        ("ivlp", {"shift_consistency": {}}, {"ce", "shift"}),
        ("coop", {"grouped_text": {}, "knowledge": {}}, {"ce", "grouped_text", "knowledge"}),
    ],
)
def test_the_terms_of_named_pairs(
    name: str, objectives: Mapping[str, Mapping[str, Any]], terms: set[str], tiny_backbone: Backbone, images: Tensor
) -> None:
    found = make(tiny_backbone, name, objectives=objectives).losses(images, LABELS)
    assert set(found) == terms and all(bool(term.isfinite()) for term in found.values())


def test_kgcoop_is_coop_with_the_knowledge_objective(tiny_backbone: Backbone, images: Tensor) -> None:
    own = make(tiny_backbone, "kgcoop")
    composed = make(tiny_backbone, "coop", context_init="a photo of a", objectives={"knowledge": {}})
    assert train(own, images) == train(composed, images)


def test_the_papers_distance_is_twice_the_codes(tiny_backbone: Backbone, images: Tensor) -> None:
    """KgCoOp's paper has the mean squared distance of unit vectors, its code one minus the mean cosine."""
    variants = ({"variant": "code"}, {"variant": "paper"})
    code, paper = (make(tiny_backbone, "kgcoop", context_init="", knowledge=one) for one in variants)
    step = paper.step(images, LABELS)
    squared = ((step.text_features - paper.active[0].target) ** 2).sum(-1).mean()
    found = [float(one.losses(images, LABELS)["knowledge"].detach()) for one in (code, paper)]
    assert found[1] == pytest.approx(2 * found[0]) == pytest.approx(8 * float(squared.detach()), rel=1e-4)


def test_promptsrc_and_restore_are_compositions(tiny_backbone: Backbone, images: Tensor) -> None:
    deep = {"text_depth": 3, "image_depth": 3}
    own = make(tiny_backbone, "promptsrc", **deep)
    composed = make(tiny_backbone, "ivlp", **deep, objectives={"self_regularisation": {}, "aggregation": {}})
    assert train(own, images) == train(composed, images)
    own = make(tiny_backbone, "restore", depth=3)
    composed = make(tiny_backbone, "maple", depth=3, objectives={"surgery": {}, "shift_consistency": {}})
    assert train(own, images) == train(composed, images)


def test_weights_of_nothing_change_nothing(tiny_backbone: Backbone, images: Tensor) -> None:
    plain = train(make(tiny_backbone, "maple", depth=2), images)
    nothing = {"surgery": {"text_ratio": 0.0, "image_ratio": 0.0}, "shift_consistency": {"weight": 0.0}}
    method = make(tiny_backbone, "maple", depth=2, objectives=nothing)
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.stack(list(method.losses(images, LABELS).values())).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(plain, rel=1e-6)


def test_the_first_step_has_no_shift(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "restore", depth=3)
    assert float(method.losses(images, LABELS)["shift"]) == 0.0
    shift = method.active[1]
    with torch.no_grad():
        for prompt in method.deep_prompts()[0]:
            prompt.mul_(2.0)
    text, image = shift.shifts()  # type: ignore[operator]
    assert torch.allclose(text, torch.full_like(text, 4.0)) and not torch.allclose(image, text)


def test_surgery_grows_once_and_is_saved(tiny_backbone: Backbone) -> None:
    method = make(tiny_backbone, "restore", depth=3)
    surgery = method.active[0]
    before = float(surgery.text_strength)  # type: ignore[arg-type]
    for epoch in range(6):
        method.epoch_end(epoch, 6)
    grown = float(surgery.text_strength)  # type: ignore[arg-type]
    assert grown > before == pytest.approx(0.1)
    surgery.epoch_end(3, 6)
    assert float(surgery.text_strength) == grown  # type: ignore[arg-type]
    other = make(tiny_backbone, "restore", depth=3)
    other.load_trained_state(method.trained_state())
    assert float(other.active[0].text_strength) == grown  # type: ignore[arg-type]


def test_aggregation_is_the_average_under_the_curve(tiny_backbone: Backbone) -> None:
    """Weights add up to one; epoch 15 of 20 with deviation 1 weighs 0.3989 (PromptSRC: promptsrc.py 262-270)."""
    weights = gaussian_weights(20, 15, 1)
    assert abs(float(weights.sum()) - 1) < 1e-12 and float(weights[14]) == pytest.approx(0.3989, abs=1e-4)
    method = make(tiny_backbone, "coop", context_length=2, objectives={"aggregation": {"mean": 2.0}})
    seen = []
    for epoch in range(3):
        with torch.no_grad():
            method.prompt.ctx.add_(1.0)  # type: ignore[union-attr, operator]
        seen.append(method.trained_state()["prompt.ctx"])
        # What a checkpoint holds carries the sums: a method restored in the middle ends alike.
        restored = make(tiny_backbone, "coop", context_length=2, objectives={"aggregation": {"mean": 2.0}})
        restored.load_state_dict(method.state_dict())
        method = restored
        method.epoch_end(epoch, 3)
    method.train_end()
    method.train_end()  # a second call changes nothing
    expected = sum(w * s for w, s in zip(gaussian_weights(3, 2, 1).float(), seen, strict=True))
    torch.testing.assert_close(method.trained_state()["prompt.ctx"], expected)


@pytest.mark.parametrize("mean", [-1e4, 15.0, 1e4])
def test_aggregation_far_from_every_epoch_is_finite(tiny_backbone: Backbone, mean: float) -> None:
    """Weights that underflow gave 0/0. The epoch nearest to the peak has nearly all the weight."""
    bell = {"mean": mean, "deviation": 0.3}
    assert float(gaussian_weights(3, mean, 0.3).sum()) == pytest.approx(1)
    method = make(tiny_backbone, "coop", context_length=2, objectives={"aggregation": bell})
    seen = []
    for epoch in range(3):
        with torch.no_grad():
            method.prompt.ctx.add_(1.0)  # type: ignore[union-attr, operator]
        seen.append(method.trained_state()["prompt.ctx"])
        method.epoch_end(epoch, 3)
    method.train_end()
    torch.testing.assert_close(method.trained_state()["prompt.ctx"], seen[0 if mean < 0 else -1], rtol=1e-4, atol=1e-4)


def test_projection() -> None:
    task, general = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    against = project(task, general, 1.0)
    assert abs(float(against @ general)) < 1e-6
    assert torch.equal(project(task, -general, 1.0), task)
    assert torch.equal(project(task, torch.zeros(2), 1.0), task)


def test_prograds_gradient_does_not_go_against_the_general_one(tiny_backbone: Backbone, images: Tensor) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        method = create_method("prograd", tiny_backbone, NAMES, context_length=3)
        labels = torch.randint(0, 4, (4,), generator=torch.Generator().manual_seed(seed))
        step, objective = method.step(images, labels), method.active[0]
        general = torch.autograd.grad(objective.general_loss(step), method.prompt.ctx)[0]  # type: ignore[operator, union-attr]
        terms = method.losses(images, labels)
        torch.stack(list(terms.values())).sum().backward()
        assert float((method.prompt.ctx.grad * general).sum()) >= -1e-6  # type: ignore[union-attr, operator]
        assert float(terms["ce"].detach()) == pytest.approx(float(F.cross_entropy(step.logits, labels).detach()))


def test_feature_shift_is_zero_without_learning_and_grows_with_it(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "coop", context_init="a photo of a")
    still = feature_shift(method, None, "a photo of a {}.")
    assert abs(still["text"]) < 1e-5 and still["image"] == 0.0
    method = make(tiny_backbone, "maple", depth=2)
    moved = feature_shift(method, images, "a photo of a {}.")
    assert moved["text"] > 0 and moved["image"] > 0 and moved["gap"] == pytest.approx(moved["text"] - moved["image"])


def test_one_file_is_all_that_a_method_takes(tiny_backbone: Backbone, images: Tensor, monkeypatch: Any) -> None:
    """A toy method that composes what is there: registered, listed, created with objectives and trained."""
    from vlprompt.methods import registry
    from vlprompt.methods.coop import CoOp, CoOpSettings

    monkeypatch.setattr(registry._METHODS, "_known", dict(registry._METHODS._known))

    @validated("settings")
    class ToySettings(CoOpSettings):
        context_length: int = 2
        knowledge: KnowledgeSettings = KnowledgeSettings(weight=1.0)

    @registry.register("toy")
    class Toy(CoOp):
        Settings = ToySettings

    assert "toy" in list_methods() and get_method_class("toy") is Toy
    method = make(tiny_backbone, "toy", objectives={"aggregation": {}})
    assert len(train(method, images)) == 2 and {type(one).__name__ for one in method.active} == {
        "Knowledge",
        "Aggregation",
    }


@pytest.mark.parametrize(
    ("objectives", "match"),
    [
        ({"knowlege": {}}, "there is no objective 'knowlege'. Did you mean 'knowledge'"),
        ({"knowledge": {"weigth": 1}}, "'objectives.knowledge.weigth'. Did you mean 'objectives.knowledge.weight'"),
        ({"knowledge": {"weight": "much"}}, "objectives.knowledge.weight is 'much'"),
        ({"knowledge": {"weight": -1.0}}, "objectives.knowledge.weight is -1.0; accepted: a finite number of 0"),
        ({"knowledge": 3}, "objectives.knowledge is 3; accepted: its settings"),
        ({"aggregation": {"deviation": 0.0}}, "deviation is 0.0; accepted: a finite number above 0"),
        ({"grouped_text": {"groups": [2]}}, "adds up to 2; objectives.grouped_text.templates holds 3"),
    ],
)
def test_wrong_objectives(objectives: Any, match: str, tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=match):
        make(tiny_backbone, "coop", objectives=objectives)
