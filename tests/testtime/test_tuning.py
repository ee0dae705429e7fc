"""Tuning of many images compared with the published loop: one image, torch's AdamW, 77 tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.errors import ConfigError
from vlprompt.testtime import tuning
from vlprompt.testtime.selection import marginal_entropy
from vlprompt.testtime.tuning import StackedAdamW

NAMES = ["golden_retriever", "jack-o'-lantern", "Boeing 737-200", "annual crop land", "cat"]


def views_of(images: int, count: int, seed: int = 0) -> Tensor:
    """Return raw features ``[B, V, 64]`` of similar views."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(images, 1, 64, generator=generator)
    return centre + 0.5 * torch.randn(images, count, 64, generator=generator)


def published(method: Any, views: Tensor) -> Tensor:
    """Reference as in the published code: one image at a time, all classes padded to 77 tokens in every pass."""
    backbone, settings, rows = method.backbone, method.settings, []
    for raw in views:
        unit = F.normalize(raw, dim=-1)
        context = method.ctx.clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], settings.lr)

        def scores(unit: Tensor = unit, context: Tensor = context) -> Tensor:
            text = backbone.text.encode(method.layout, context, algorithm="padded")[0]
            return backbone.logit_scale * unit @ F.normalize(text, dim=-1).t()  # type: ignore[no-any-return]

        chosen = None
        for _ in range(settings.steps):
            logits = scores()
            if chosen is None:
                chosen = method.select(logits[None].detach(), unit[None])[0]
            optimizer.zero_grad()
            marginal_entropy(logits[chosen]).backward()
            optimizer.step()
        rows.append(scores()[0].detach())
    return torch.stack(rows)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("tpt", {"confidence": 0.3}),
    ("tpt", {"confidence": 0.5, "steps": 3, "context_init": "a photo of [CLS] here", "images_at_once": 2}),
    ("tpt", {"context_init": "", "context_length": 3, "jacobian": True}),
    ("difftpt", {"generated": 4, "images_at_once": 3}),
    ("difftpt", {"generated": 4, "variant": "paper", "steps": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o))}" for n, o in CASES])
def test_many_images_match_the_published_loop(tiny_backbone: Backbone, name: str, options: Any) -> None:
    torch.manual_seed(1)
    method: Any = create_method(name, tiny_backbone, NAMES, **options)
    views = views_of(5, 10)
    torch.testing.assert_close(method.adapt(views), published(method, views), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_images_of_a_batch_are_independent(tiny_backbone: Backbone, at_once: int) -> None:
    method: Any = create_method("difftpt", tiny_backbone, NAMES, steps=3, generated=4, images_at_once=at_once)
    views = views_of(5, 12)
    together = method.tuned(views)
    alone = [method.tuned(result[None]) for result in views]
    for field in ("logits", "losses", "gradients"):
        stacked = torch.cat([getattr(result, field) for result in alone])
        torch.testing.assert_close(stacked, getattr(together, field), rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cat([result.selected for result in alone]), together.selected)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(method.adapt(views[order]), together.logits[order], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["tpt", "difftpt"])
@pytest.mark.parametrize("options", [{"lr": 0.0}, {"steps": 0}], ids=str)
def test_zero_rate_or_zero_steps_is_zero_shot(tiny_backbone: Backbone, name: str, options: dict[str, Any]) -> None:
    views = views_of(3, 8)
    expected = create_method("zeroshot", tiny_backbone, NAMES)(views[:, 0])
    method: Any = create_method(name, tiny_backbone, NAMES, **options)
    torch.testing.assert_close(method.adapt(views), expected, rtol=1e-5, atol=1e-4)


def test_the_first_step_follows_the_signs_of_the_gradient(tiny_backbone: Backbone) -> None:
    method: Any = create_method("tpt", tiny_backbone, NAMES)
    tuned = method.tuned(views_of(3, 10))
    gradient = tuned.gradients[:, 0]
    expected = method.ctx * 0.99995 - 0.005 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(tuned.contexts[:, 0], expected, rtol=0, atol=1e-7)


def test_equal_views_have_the_loss_and_gradient_of_one_view(tiny_backbone: Backbone) -> None:
    method: Any = create_method("tpt", tiny_backbone, NAMES, confidence=1.0)
    views = views_of(2, 1)
    single, several = method.tuned(views), method.tuned(views.expand(-1, 6, -1))
    torch.testing.assert_close(several.losses, single.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(several.gradients, single.gradients, rtol=1e-4, atol=1e-6)


def test_a_small_step_lowers_the_entropy_of_the_mean(tiny_backbone: Backbone) -> None:
    method: Any = create_method("tpt", tiny_backbone, NAMES, lr=1e-5, steps=2, confidence=0.5)
    losses = method.tuned(views_of(4, 12)).losses
    assert bool((losses[:, 1] <= losses[:, 0] + 1e-6).all()) and bool((losses >= 0).all())


def test_the_jacobian_gives_the_gradients_of_backward_passes(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_CLASSES_AT_ONCE", 2)
    options: dict[str, Any] = {"context_init": "a photo of [CLS] at dusk", "confidence": 0.4}
    plain: Any = create_method("tpt", tiny_backbone, NAMES, **options)
    other: Any = create_method("tpt", tiny_backbone, NAMES, jacobian=True, **options)
    views = views_of(4, 10)
    torch.testing.assert_close(other.tuned(views).gradients, plain.tuned(views).gradients, rtol=1e-3, atol=1e-5)
    derivatives = other._derivatives
    assert derivatives.shape == (5, 64, 5, 128)
    other.adapt(views)
    assert other._derivatives is derivatives  # computed once
    other.load_trained_state({"ctx": other.ctx + 0.1})
    plain.load_trained_state({"ctx": other.ctx})
    torch.testing.assert_close(other.tuned(views).gradients, plain.tuned(views).gradients, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(tuning, "total_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="settings.jacobian"):
        create_method("tpt", tiny_backbone, NAMES, jacobian=True)(views)


def test_difftpt_without_generated_images_and_cosine_filter_is_tpt(tiny_backbone: Backbone) -> None:
    views = views_of(3, 20)
    same: dict[str, Any] = {"confidence": 0.1, "steps": 1, "crops": 19}
    tpt, difftpt = (
        create_method(name, tiny_backbone, NAMES, **options)
        for name, options in (("tpt", same), ("difftpt", {**same, "similarity": 1.0, "generated": 0}))
    )
    assert torch.equal(difftpt(views), tpt(views))


def test_chunks_of_classes_change_nothing(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = create_method("tpt", tiny_backbone, NAMES, steps=2)
    views = views_of(3, 10)
    expected = method.tuned(views)
    monkeypatch.setattr(tiny_backbone.text, "classes_per_chunk", 2)
    chunked = method.tuned(views)
    torch.testing.assert_close(chunked.gradients, expected.gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(chunked.logits, expected.logits, rtol=1e-4, atol=1e-3)


def test_zero_loss_changes_the_context_only_by_decay(tiny_backbone: Backbone) -> None:
    method: Any = create_method("tpt", tiny_backbone, ["cat"])
    tuned = method.tuned(views_of(2, 10))  # one class: entropy 0, gradient 0
    assert torch.equal(tuned.losses, torch.zeros(2, 1))
    torch.testing.assert_close(tuned.contexts[:, 0], (method.ctx * 0.99995).expand(2, -1, -1))


@pytest.mark.parametrize("steps", [1, 5])
def test_stacked_adamw_equals_torchs_for_every_row(steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, 4, 5, generator=generator)
    gradients = torch.randn(steps, 3, 4, 5, generator=generator)
    values, ours = {"x": start}, StackedAdamW(0.01)
    for gradient in gradients:
        values = ours.step(values, {"x": gradient})
    for row in range(3):
        parameter = torch.nn.Parameter(start[row].clone())
        theirs = torch.optim.AdamW([parameter], 0.01)
        for gradient in gradients:
            parameter.grad = gradient[row].clone()
            theirs.step()
        torch.testing.assert_close(values["x"][row], parameter.detach(), rtol=1e-6, atol=1e-7)
