"""Additions inside the blocks: an empty one changes nothing, and all algorithms agree on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbone import Added, Backbone
from vlprompt.errors import BackboneError
from vlprompt.prompts import template_layout

NAMES = ["cat", "jack-o'-lantern", "annual crop land", "sea_lake"]
TEMPLATES = ["a photo of a {}.", "itap of many {}, at night."]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("added", 3, 64))


def all_additions(width: int, layers: int) -> tuple[Added, list[Tensor]]:
    """Return updates of q, v and o, a change after every attention and rows in two layers, with their tensors."""
    torch.manual_seed(0)
    tensors = []

    def matrix(scale: float) -> Tensor:
        tensors.append((torch.randn(width, width) * scale).requires_grad_())
        return tensors[-1]

    def update(weight: Tensor) -> Any:
        return lambda x: x @ weight

    def after_attention(weight: Tensor) -> Any:
        return lambda normed, result: result * 1.1 + normed @ weight

    projections = {(layer, name): update(matrix(0.01)) for layer in range(layers) for name in ("q", "v", "o")}
    after = {layer: after_attention(matrix(0.01)) for layer in range(layers)}
    rows = {layer: torch.randn(3, width).requires_grad_() for layer in (0, layers - 1)}
    return Added(projections, after, rows), [*tensors, *rows.values()]


def test_empty_additions_leave_the_frozen_tower_unchanged(tiny_backbone: Backbone, images: Tensor) -> None:
    plain = tiny_backbone.encode_image(images)
    torch.testing.assert_close(tiny_backbone.encode_image(images, added=Added()), plain, rtol=1e-5, atol=1e-6)
    layout = template_layout(tiny_backbone.text, NAMES, TEMPLATES)
    assert torch.equal(tiny_backbone.text.encode(layout, added=Added()), tiny_backbone.text.encode(layout))


def test_packed_and_padded_text_with_additions_agree(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    added, tensors = all_additions(text.width, text.layers)
    layout = template_layout(text, NAMES, TEMPLATES)
    results = {}
    for algorithm in ("packed", "padded"):
        features = text.encode(layout, algorithm=algorithm, added=added)  # type: ignore[arg-type]
        results[algorithm] = [features, *torch.autograd.grad(features.sin().sum(), tensors)]
    for packed, padded in zip(results["packed"], results["padded"], strict=True):
        torch.testing.assert_close(packed, padded, rtol=2e-4, atol=1e-5 * float(padded.abs().max()))
    assert not torch.allclose(results["packed"][0], text.encode(layout), atol=1e-2)


def test_text_chunks_repeat_random_draws_in_the_backward_pass(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    weight = (torch.randn(text.width, text.width) * 0.05).requires_grad_()
    kept: list[Tensor] = []

    def update(x: Tensor) -> Tensor:
        dropped = F.dropout(x, 0.5)
        kept.append(dropped.detach())
        return dropped @ weight

    layout = template_layout(text, NAMES, TEMPLATES[:1])
    text.classes_per_chunk = 2
    try:
        text.encode(layout, added=Added({(1, "q"): update})).sum().backward()
    finally:
        text.classes_per_chunk = None
    first, again = kept[:2], kept[2:]
    assert len(again) == 2 and not torch.equal(first[0] == 0, first[1][: len(first[0])] == 0)
    assert all(any(torch.equal(mask, other) for other in again) for mask in first)


def test_computing_only_the_class_token_in_the_last_block_changes_nothing(
    tiny_backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlprompt.backbone import image_tower

    added, tensors = all_additions(tiny_backbone.image.width, tiny_backbone.image.layers)
    short = tiny_backbone.encode_image(images, added=added)
    gradients = torch.autograd.grad(short.sin().sum(), tensors)
    monkeypatch.setattr(image_tower, "LAST_BLOCK_FOR_CLASS_TOKEN", False)
    whole = tiny_backbone.encode_image(images, added=added)
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, torch.autograd.grad(whole.sin().sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("algorithm", ["packed", "padded"])
def test_overrides_of_the_text_tower(tiny_backbone: Backbone, algorithm: Any) -> None:
    text = tiny_backbone.text
    layout = template_layout(text, NAMES, TEMPLATES[:1])
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    weight = text.parameters()[name]
    other = (weight.detach() * 0.5).requires_grad_()
    plain = text.encode(layout, algorithm=algorithm)
    assert torch.equal(text.encode(layout, algorithm=algorithm, overrides={name: weight}), plain)
    changed = text.encode(layout, algorithm=algorithm, overrides={name: other})
    (gradient,) = torch.autograd.grad(changed.sum(), other)
    assert not torch.allclose(changed, plain, atol=1e-3) and float(gradient.abs().max()) > 0
    text.classes_per_chunk = 2
    try:
        chunked = text.encode(layout, algorithm=algorithm, overrides={name: other})
        (again,) = torch.autograd.grad(chunked.sum(), other)
    finally:
        text.classes_per_chunk = None
    torch.testing.assert_close(chunked, changed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert torch.equal(text.encode(layout, algorithm=algorithm), plain)


def test_unknown_or_misshapen_overrides_are_refused(tiny_backbone: Backbone) -> None:
    text = tiny_backbone.text
    layout = template_layout(text, NAMES, TEMPLATES[:1])
    assert not any(name.startswith("visual") for name in text.parameters())
    with pytest.raises(BackboneError, match="no such parameter"):
        text.encode(layout, overrides={"transformer.resblocks.0.mlp.c_fc.weights": torch.zeros(1)})
    with pytest.raises(BackboneError, match=r"shape \[1\], expected"):
        text.encode(layout, overrides={"ln_final.weight": torch.zeros(1)})
