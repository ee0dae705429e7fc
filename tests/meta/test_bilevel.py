"""Bi-level steps: closed forms on a quadratic, and finite differences in float64 on the tiny CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.meta import Regulator, RegulatorSettings, adapted, differentiable, inner_rates, task_loss
from vlprompt.methods import PromptMethod

SUPPORT, QUERY = ["cat", "dog", "red car"], ["blue bird", "old house", "tree"]
HOSTS: dict[str, dict[str, Any]] = {
    "coop": {"context_init": "a photo of a"},
    "cocoop": {},
    "vpt": {"image_depth": 2, "image_tokens": 2},
    "ivlp": {"text_depth": 2, "image_depth": 2, "image_tokens": 2},
    "maple": {"depth": 2},
    "mocoop": {},
}


# -- a quadratic ----------------------------------------------------------------------------------------------------
H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
SUPPORT_AT, QUERY_AT = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.0, 3.0]).double()
ALPHA = 0.1


def bowl(centre: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda tensors: (tensors["x"] - centre) @ H @ (tensors["x"] - centre) / 2


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("order", ["first", "second"])
def test_first_and_second_order_on_a_quadratic(steps: int, order: Any) -> None:
    x = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    moved = adapted(bowl(SUPPORT_AT), {"x": x}, {"x": ALPHA}, steps=steps, order=order)["x"]
    contraction = torch.linalg.matrix_power(torch.eye(2).double() - ALPHA * H, steps)
    expected = SUPPORT_AT + contraction @ (x.detach() - SUPPORT_AT)
    torch.testing.assert_close(moved.detach(), expected)
    (gradient,) = torch.autograd.grad(bowl(QUERY_AT)({"x": moved}), x)
    plain = H @ (expected - QUERY_AT)
    torch.testing.assert_close(gradient, contraction @ plain if order == "second" else plain)


def test_tensors_without_influence_on_the_loss_do_not_change() -> None:
    x, y = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(1, requires_grad=True)
    moved = adapted(bowl(SUPPORT_AT), {"x": x, "y": y}, {"x": ALPHA, "y": ALPHA})
    assert moved["y"] is y and not torch.equal(moved["x"], x)


# -- methods --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wide(tiny_state_dict: Callable[..., dict[str, Tensor]]) -> Backbone:
    """The tiny CLIP in float64."""
    backbone = Backbone.from_state_dict(tiny_state_dict(), name="tiny")
    backbone.model.double()
    return backbone


def host(name: str, backbone: Backbone) -> PromptMethod:
    torch.manual_seed(3)
    method = create_method(name, backbone, SUPPORT, **HOSTS[name])
    for module in method.modules():
        if module is not backbone and not any(module is frozen for frozen in backbone.modules()):
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = torch.nn.Parameter(parameter.detach().double())
    return method


def inputs(method: PromptMethod, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, *[method.backbone.preprocess.size] * 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return images if method.needs.images else method.backbone.encode_image(images)


class Outer:
    """The query loss after inner steps, as a function of trainable parameters and regulator."""

    def __init__(self, name: str, backbone: Backbone, kind: Any, order: Any, steps: int, regulator: str) -> None:
        self.method, self.kind, self.order, self.steps = host(name, backbone), kind, order, steps
        shapes = {key: tuple(value.shape) for key, value in self.method.prompt_tensors()}
        torch.manual_seed(5)
        self.regulator = Regulator(shapes, backbone.embed_dim, RegulatorSettings(regulator, gate_bias=0.5)).double()  # type: ignore[arg-type]
        with torch.no_grad():  # away from the initialisation, where half of a sigmoid gate is zero
            for parameter in self.regulator.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.query = self.method.with_classes(QUERY)
        self.support_inputs, self.query_inputs = inputs(self.method, 1), inputs(self.method, 2)
        self.labels = torch.arange(3)
        self.feature = torch.linspace(-1, 1, backbone.embed_dim).double()
        self.rates = inner_rates(self.method, 0.02)
        self.kept: dict[str, list[Tensor]] = {}
        self.replay = False

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.method.trainable_parameters())

    def loss(self) -> Tensor:
        """Return the outer loss; with ``replay`` the inner gradients are constants recorded in the first call."""
        if not self.replay:
            self.kept = {}

        def regulate(name: str, gradient: Tensor) -> Tensor:
            if self.replay:
                gradient = self.kept[name].pop(0)
            else:
                self.kept.setdefault(name, []).append(gradient.detach().clone())
            return self.regulator(name, gradient, self.feature)

        with differentiable("second"):
            moved = adapted(
                lambda tensors: task_loss(self.method, tensors, self.support_inputs, self.labels, self.kind),
                self.tensors(),
                self.rates,
                steps=self.steps,
                order=self.order,
                regulate=regulate,
            )
            return task_loss(self.query, moved, self.query_inputs, self.labels, self.kind)


@pytest.mark.covering(rows="name", every=2)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("name", "kind", "regulator", "steps"),
    [
        ("coop", "infonce", "rescale-gate", 1),
        ("coop", "cross-entropy", "sigmoid-gate", 2),
        ("cocoop", "infonce", "sigmoid-gate", 1),
        ("vpt", "cross-entropy", "rescale-gate", 1),
        ("ivlp", "infonce", "rescale-gate", 2),
        ("maple", "infonce", "rescale-gate", 1),
        ("mocoop", "cross-entropy", "rescale-gate", 1),
    ],
)
def test_outer_gradients_match_finite_differences(
    wide: Backbone, name: str, kind: str, regulator: str, steps: int, order: str
) -> None:
    outer = Outer(name, wide, kind, order, steps, regulator)
    learned = [*outer.tensors().values(), *outer.regulator.parameters()]
    gradients = torch.autograd.grad(outer.loss(), learned, allow_unused=True)
    kept = {key: list(values) for key, values in outer.kept.items()}
    outer.replay = order == "first"
    generator = torch.Generator().manual_seed(11)
    names = [*outer.tensors(), *(key for key, _ in outer.regulator.named_parameters())]
    # Prompts and tensors of the regulator one by one, all others (norms, a router) in one direction.
    others = set(outer.tensors()) - {key for key, _ in outer.method.prompt_tensors()}
    groups: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for label, tensor, gradient in zip(names, learned, gradients, strict=True):
        if gradient is not None:
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            groups.setdefault("others" if label in others else label, []).append((tensor, gradient, direction))
    checked = 0
    for label, group in groups.items():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for tensor, _, direction in group:
                    tensor += sign * 1e-6 * direction
            outer.kept = {key: list(values) for key, values in kept.items()}
            values.append(float(outer.loss().detach()))
            with torch.no_grad():
                for tensor, _, direction in group:
                    tensor -= sign * 1e-6 * direction
        difference = (values[0] - values[1]) / 2e-6
        analytic = sum(float((gradient * direction).sum()) for _, gradient, direction in group)
        assert analytic == pytest.approx(difference, rel=2e-4, abs=1e-8), label
        checked += abs(difference) > 1e-8
    assert checked >= 3  # prompts and both kinds of tensors of the regulator


@pytest.mark.parametrize("name", list(HOSTS))
def test_without_inner_rate_the_gradient_is_that_of_the_query_loss(wide: Backbone, name: str) -> None:
    method = host(name, wide)
    batch, labels = inputs(method, 2), torch.arange(3)
    tensors = dict(method.trainable_parameters())
    moved = adapted(
        lambda replaced: task_loss(method, replaced, inputs(method, 1), labels, "cross-entropy"),
        tensors,
        dict.fromkeys(tensors, 0.0),
    )
    outer = task_loss(method, moved, batch, labels, "cross-entropy")
    gradients = torch.autograd.grad(outer, list(tensors.values()), allow_unused=True)
    plain = torch.stack(list(method.losses(batch, labels).values())).sum()
    torch.testing.assert_close(outer, plain)
    expected = torch.autograd.grad(plain, list(tensors.values()), allow_unused=True)
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("rate", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["rescale-gate", "sigmoid-gate"])
def test_the_regulator_learns_only_through_inner_steps(wide: Backbone, rate: float, kind: str) -> None:
    outer = Outer("coop", wide, "infonce", "first", 1, kind)
    outer.rates = dict.fromkeys(outer.rates, rate)
    gradients = torch.autograd.grad(outer.loss(), list(outer.regulator.parameters()))
    if rate:
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
    else:
        assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_infonce_is_symmetric_cross_entropy(wide: Backbone) -> None:
    method = host("coop", wide)
    batch, labels = inputs(method, 1), torch.arange(3)
    logits = method(batch)
    losses = [torch.nn.functional.cross_entropy(rows, labels) for rows in (logits, logits.t())]
    loss = task_loss(method, dict(method.trainable_parameters()), batch, labels, "infonce")
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("coop", {"prompt.ctx"}),
        ("cocoop", {"prompt.ctx"}),  # gradients of the meta-network are not regulated
        ("vpt", {"visual.input", "visual.deep.0"}),
        ("ivlp", {"context.ctx", "context.deep.0", "visual.input", "visual.deep.0"}),
        ("maple", {"prompts.context.ctx", "prompts.context.deep.0"}),
    ],
)
def test_only_prompts_are_regulated(tiny_backbone: Backbone, name: str, prompts: set[str]) -> None:
    method = create_method(name, tiny_backbone, SUPPORT, **HOSTS[name])
    assert {key for key, _ in method.prompt_tensors()} == prompts


def test_router_and_norms_of_a_mixture_are_not_regulated(tiny_backbone: Backbone) -> None:
    names = {key for key, _ in create_method("mocoop", tiny_backbone, SUPPORT).prompt_tensors()}
    assert "experts.before.0" in names and not any(key.startswith(("gate", "norms")) for key in names)


def test_inner_rates_follow_the_method(tiny_backbone: Backbone) -> None:
    rates = inner_rates(create_method("mocoop", tiny_backbone, SUPPORT), 0.1)
    assert rates["gate.weight"] == pytest.approx(0.1)
    norms = [rate for name, rate in rates.items() if name.startswith("norms.")]
    assert norms and norms == pytest.approx([0.01] * len(norms))
