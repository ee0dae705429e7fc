"""Loss terms of mixtures: text supervision of experts and supervision of the router (MoCoOp)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.methods.mocoop import routing_loss, routing_target
from vlprompt.objectives.grouped_text import text_to_text_loss


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_text_loss_is_the_mean_cross_entropy_over_experts_and_classes() -> None:
    experts, prototypes = units(3, 4, 8), units(3, 4, 8, seed=1)
    for temperature in (1.0, 100.0):
        rows = []
        for g in range(3):
            for c in range(4):
                scores = [temperature * float(experts[g, c] @ prototypes[g, other]) for other in range(4)]
                top = max(scores)
                rows.append(top + math.log(sum(math.exp(s - top) for s in scores)) - scores[c])
        expected = sum(rows) / len(rows)
        assert float(text_to_text_loss(experts, prototypes, temperature)) == pytest.approx(expected, rel=1e-5)


def test_text_loss_falls_as_experts_near_their_prototypes() -> None:
    prototypes = units(2, 5, 16)
    far, near = units(2, 5, 16, seed=1), F.normalize(prototypes + 0.1 * units(2, 5, 16, seed=1), dim=-1)
    assert text_to_text_loss(near, prototypes) < text_to_text_loss(far, prototypes)
    assert float(text_to_text_loss(prototypes, prototypes, 100.0)) < 1e-3


def test_one_class_has_no_text_loss_and_no_gradient() -> None:
    experts = units(2, 1, 8).requires_grad_()
    loss = text_to_text_loss(experts, units(2, 1, 8, seed=1))
    loss.backward()
    assert float(loss.detach()) == 0 and not experts.grad.any()


cosines = st.integers(-1000, 1000).map(lambda thousandths: thousandths / 1000)


@given(
    rows=st.integers(2, 20).flatmap(
        lambda experts: st.lists(
            st.lists(cosines, min_size=experts, max_size=experts, unique=True), min_size=1, max_size=4
        )
    ),
    shift=st.floats(-5, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_target_sums_to_one_lies_on_the_top_and_ignores_a_constant(rows: list[list[float]], shift: float) -> None:
    affinity = torch.tensor(rows, dtype=torch.float64)
    target = routing_target(affinity, 2)
    torch.testing.assert_close(target.sum(dim=-1), torch.ones(len(rows), dtype=torch.float64))
    torch.testing.assert_close(routing_target(affinity + shift, 2), target, rtol=1e-6, atol=1e-9)
    experts = affinity.shape[1]
    assert bool((target.topk(2).values.sum(dim=-1) >= 1 - 1e-9 - (experts - 2) * math.exp(-10)).all())


def test_target_puts_more_than_999_permille_on_the_top_two_of_twenty() -> None:
    affinity = 0.25 + 0.05 * torch.rand(64, 20, generator=torch.Generator().manual_seed(0))
    target = routing_target(affinity, 2)
    assert torch.equal(target.topk(2).indices, affinity.topk(2).indices)
    assert float(target.topk(2).values.sum(dim=-1).min()) > 0.999
    assert float((target.topk(2).values - 0.5).abs().max()) < 0.02


def test_target_lets_gradients_through_to_the_affinity() -> None:
    affinity = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing_loss(units(3, 5), routing_target(affinity, 2)).backward()
    assert affinity.grad.abs().sum() > 0


def test_routing_loss_is_the_soft_cross_entropy_over_all_experts() -> None:
    logits, target = units(3, 5), units(3, 5, seed=1).softmax(dim=-1)
    expected = -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    torch.testing.assert_close(routing_loss(logits, target), expected)


def test_routing_loss_is_least_where_the_router_agrees() -> None:
    target = routing_target(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), 2)
    least = routing_loss(target.log(), target)
    assert least < routing_loss(torch.zeros_like(target), target)
    assert float(least) == pytest.approx(math.log(2), abs=0.1)
