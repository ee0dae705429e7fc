"""APT's diffusion against its formula, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlprompt.prompts import Diffusion


def made(count: int = 6, width: int = 8, **more: int) -> Diffusion:
    torch.manual_seed(0)
    diffusion = Diffusion(count, width, **more)  # type: ignore[arg-type]
    for parameter in diffusion.parameters():
        torch.nn.init.normal_(parameter) if parameter.ndim else parameter.data.fill_(0.3)
    return diffusion


def reference(own: Diffusion, r: Tensor, x: Tensor) -> Tensor:
    """The official module, token by token."""
    m = own.tokens.double()
    keys = m + m @ own.down.weight.double().t() @ own.up.weight.double().t()
    values = m if own.values is None else own.values.double()
    rows = []
    for token, result in zip(r.double(), x.double(), strict=True):
        affinity = torch.tensor([max(0.0, float(token @ key)) for key in keys], dtype=torch.float64)
        rows.append(own.sigma.double().exp() * (result + affinity.max() * (affinity @ values)))
    return torch.stack(rows).detach()


def test_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in Diffusion(200, 768, 4).parameters()) == 159_745


@pytest.mark.parametrize("separate", [0, 1])
def test_it_is_the_formula(separate: int) -> None:
    own, r, x = made(separate_values=separate), torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(own(r, x).double().detach(), reference(own, r, x), rtol=1e-5, atol=1e-5)


def test_heads_are_diffusions_in_slices_of_the_width() -> None:
    own, r, x = made(heads=2), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    keys, named = own.keys(), own(r, x)
    for part in (slice(0, 4), slice(4, 8)):
        affinity = (r[..., part] @ keys[:, part].t()).relu()
        expected = x[..., part] + affinity.amax(-1, keepdim=True) * (affinity @ own.tokens[:, part])
        torch.testing.assert_close(named[..., part], own.sigma.exp() * expected)


def test_no_tokens_or_tokens_of_zero_leave_the_result() -> None:
    r, x = torch.randn(5, 8), torch.randn(5, 8)
    zero = Diffusion(6, 8)
    assert not torch.equal(zero(r, x), x), "as published it does not start as the frozen model"
    torch.nn.init.zeros_(zero.tokens)
    assert torch.equal(zero(r, x), x)
    assert torch.equal(Diffusion(0, 8)(r, x), x)
    assert torch.equal(Diffusion(6, 8, separate_values=True)(r, x), x)


def test_keys_are_the_tokens_at_first() -> None:
    own = Diffusion(6, 8)
    assert torch.equal(own.keys(), own.tokens) and float(own.down.weight.detach().std()) == pytest.approx(1, abs=0.4)


def test_no_gradient_goes_through_the_maximum() -> None:
    own, x = made(), torch.zeros(1, 8)
    r = torch.randn(1, 8, requires_grad=True)
    weight = (r @ own.keys().t()).relu().amax().detach()
    (found,) = torch.autograd.grad(own(r, x).sum(), r)
    (held,) = torch.autograd.grad((own.sigma.exp() * weight * ((r @ own.keys().t()).relu() @ own.tokens)).sum(), r)
    torch.testing.assert_close(found, held)
    free = (r @ own.keys().t()).relu()
    (flowing,) = torch.autograd.grad((own.sigma.exp() * free.amax() * (free @ own.tokens)).sum(), r)
    assert not torch.allclose(found, flowing, rtol=1e-2)


def test_tokens_are_told_each_by_itself() -> None:
    own, r, x = made(), torch.randn(5, 8), torch.randn(5, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(own(r[order], x[order]), own(r, x)[order])
