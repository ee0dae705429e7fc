"""Gradient dropout against its closed form (R-AMT: code/trainers/masktuning.py 338-387)."""

from __future__ import annotations

import pytest
import torch

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.errors import ConfigError
from vlprompt.objectives.gradient_dropout import drop, keep_probability

A = torch.tensor([1.0, -1.0, 1.0, -2.0, 0.0, 1e-3])
B = torch.tensor([2.0, -0.5, -1.0, 6.0, 1.0, -1e6])


def test_the_probability_on_a_grid() -> None:
    # Agreement 1; opposition |a| / (|a| + |b|); 0 one half, whatever the other; a crushing opposition 0.
    torch.testing.assert_close(keep_probability(A, B), torch.tensor([1.0, 1.0, 0.5, 0.25, 0.5, 0.0]), rtol=0, atol=1e-6)
    # Where both are near the small constant, half of what agrees is dropped.
    tiny = torch.tensor([1e-12])
    assert float(keep_probability(tiny, tiny)) == pytest.approx(0.5, abs=1e-3)


def test_as_many_are_kept_as_the_probability_says() -> None:
    torch.manual_seed(0)
    count = 20_000
    kept = drop(A[:4].repeat(count, 1), B[:4].repeat(count, 1), torch.rand(count, 4), 1.0) != 0
    expected = keep_probability(A[:4], B[:4])
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((kept.float().mean(0) - expected).abs() <= 3 * deviation + 1e-6).all())


def test_strength_scales_what_is_dropped() -> None:
    uniform = torch.full_like(A, 0.9999)
    assert torch.equal(drop(A, B, uniform, 0.0), A)
    assert torch.equal(drop(A, A, uniform, 1.0)[:4], A[:4])
    torch.testing.assert_close(drop(A, B, uniform, 0.25), torch.where(keep_probability(A, B) > 0.9999, A, 0.75 * A))


def test_the_step_is_the_dropped_gradient(tiny_backbone: Backbone) -> None:
    """The gradient of the terms' sum holds entries of the task's gradient, and zeros; equal seeds, equal zeros."""
    features, labels = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    found = []
    for own in ({}, {"gradient_dropout": {}}, {"gradient_dropout": {}}):
        torch.manual_seed(0)
        method = create_method("coop", tiny_backbone, ["cat", "dog"], objectives=own)
        terms = method.losses(features, labels)
        torch.stack(list(terms.values())).sum().backward()
        found.append(method.prompt.ctx.grad)
        assert set(terms) == {"ce", "general"} if own else {"ce"}
    task, dropped, again = found
    zeros = dropped == 0
    assert torch.equal(dropped, again) and 0 < int(zeros.sum()) < zeros.numel()
    torch.testing.assert_close(dropped[~zeros], task[~zeros], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("own", [{"strength": 1.5}, {"strength": -0.1}, {"temperature": 0.0}])
def test_values_that_are_not_accepted(tiny_backbone: Backbone, own: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"gradient_dropout.{next(iter(own))}"):
        create_method("coop", tiny_backbone, ["cat", "dog"], objectives={"gradient_dropout": own})
