"""Gradient regulators: equations, invariants and sharing."""

from __future__ import annotations

import math

import pytest
import torch

from vlprompt.errors import ConfigError
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.meta.regulators import RescaleGate, SigmoidGate

SHAPES = {"prompt.ctx": (4, 12), "deep.0": (4, 12), "visual.input": (2, 20)}
KINDS = ["rescale-gate", "sigmoid-gate"]


def make(kind: str, **options: object) -> Regulator:
    torch.manual_seed(0)
    return Regulator(SHAPES, 6, RegulatorSettings(kind=kind, **options))  # type: ignore[arg-type]


def gradient(name: str = "prompt.ctx", seed: int = 1) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def perturbed(regulator: Regulator) -> Regulator:
    """Return the regulator with all parameters changed, as if it had been trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in regulator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return regulator


def test_rescaled_rows_keep_their_length() -> None:
    gate = perturbed(make("rescale-gate")).gates["prompt-ctx"]
    assert isinstance(gate, RescaleGate)
    raw = gradient() * torch.tensor([[1e-4], [1.0], [1e3], [0.0]])
    torch.testing.assert_close(gate.rescaled(raw).norm(dim=-1), raw.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gradient_stays_zero_and_differentiable(kind: str) -> None:
    regulator = perturbed(make(kind))
    zero = torch.zeros(4, 12, requires_grad=True)
    regulated = regulator("prompt.ctx", zero, torch.ones(6))
    assert torch.equal(regulated, torch.zeros(4, 12))
    regulated.sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_gate_is_exactly_the_identity(kind: str) -> None:
    regulator = make(kind, gate_bias=math.inf)
    for name in SHAPES:
        assert torch.equal(regulator(name, gradient(name), torch.ones(6)), gradient(name))


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_regulator_is_near_the_identity(kind: str) -> None:
    regulated = make(kind)("prompt.ctx", gradient(), torch.zeros(6)).detach()
    share = torch.nn.functional.cosine_similarity(regulated.flatten(), gradient().flatten(), dim=0)
    assert share > 0.99 and 0.95 < float(regulated.norm() / gradient().norm()) < 1.01


def test_the_rescale_gate_follows_its_equation() -> None:
    # The equation of RescaleGate, row by row.
    gate = perturbed(make("rescale-gate", rank=3)).gates["prompt-ctx"]
    assert isinstance(gate, RescaleGate)
    feature, raw = torch.linspace(-1, 1, 6), gradient()
    c = torch.sigmoid(gate.gate.weight @ torch.relu(gate.hidden.weight @ feature + gate.hidden.bias) + gate.gate.bias)
    rows = []
    for row in raw:
        h = row
        for A, B, b in zip(gate.down, gate.up, gate.bias, strict=True):
            assert A.shape == (3, 12) and B.shape == (12, 3)
            h = torch.relu(B @ (A @ h) + b)
        rows.append((1 - c) * h * row.norm() / (h.norm() + 1e-8) + c * row)
    torch.testing.assert_close(gate(raw, feature), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_the_sigmoid_gate_follows_its_equation() -> None:
    gate = perturbed(make("sigmoid-gate")).gates["visual-input"]
    assert isinstance(gate, SigmoidGate)
    raw = gradient("visual.input")
    shares = torch.sigmoid(gate.up.weight @ (gate.down.weight @ raw.reshape(-1)) + 4.0).reshape(2, 20)
    torch.testing.assert_close(gate(raw, torch.zeros(6)), raw * shares)
    assert gate.down.weight.shape == (8, 40)


def test_one_regulator_per_tensor_or_per_shape() -> None:
    assert set(make("rescale-gate").gates) == {"prompt-ctx", "deep-0", "visual-input"}
    assert set(make("rescale-gate", sharing="shape").gates) == {"12", "20"}
    assert set(make("sigmoid-gate", sharing="shape").gates) == {"4x12", "2x20"}


def test_gradients_of_other_tensors_are_unchanged() -> None:
    raw = torch.randn(3, 3)
    assert make("rescale-gate")("meta_net.linear1.weight", raw, torch.ones(6)) is raw
    with pytest.raises(ConfigError, match="no prompts"):
        Regulator({}, 6, RegulatorSettings())
