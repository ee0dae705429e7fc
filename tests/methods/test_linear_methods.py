"""CLIP-Adapter, TaskRes, the linear probe and LP++ in the registry: what the shared suites do not ask of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.methods.fitted import FewShotFeatures

NAMES = ["cat", "annual crop land", "aeroplane"]


def shots_of(text: Tensor, views: int = 1, val: int = 9) -> FewShotFeatures:
    draw = torch.Generator().manual_seed(4)

    def around(labels: Tensor, *more: int) -> Tensor:
        return 3 * (F.normalize(text, dim=-1)[labels] + 0.1 * torch.randn(*more, len(labels), 64, generator=draw))

    labels, truth = torch.arange(3).repeat(4), torch.arange(val) % 3
    nothing = torch.empty(0, 64)
    return FewShotFeatures(around(labels, views), labels, around(truth), truth, nothing, nothing[None][:0])


# -- CLIP-Adapter -----------------------------------------------------------------------------------------------------
def test_clip_adapter_blends_raw_features_as_published(tiny_backbone: Backbone, tiny_clip: Any) -> None:
    images = torch.from_numpy(tiny_clip.draw_images("adapter", 3, 64))
    method: Any = create_method("clip_adapter", tiny_backbone, NAMES)
    first, second = method.adapter.down.weight.detach(), method.adapter.up.weight.detach()
    assert first.numel() + second.numel() == 64**2 // 2  # D^2 / 2
    assert float(first.abs().max()) <= 1 / math.sqrt(64) and float(second.abs().max()) <= 1 / math.sqrt(16)
    with torch.no_grad():
        g = tiny_backbone.encode_image(images)
        hidden = (g @ first.t()).clamp(min=0)
        blended = 0.2 * (hidden @ second.t()).clamp(min=0) + 0.8 * g
        text = create_method("zeroshot", tiny_backbone, NAMES).text_features()
        expected = tiny_backbone.logit_scale * blended / blended.norm(dim=-1, keepdim=True) @ text.t()
        torch.testing.assert_close(method(images), expected, rtol=1e-5, atol=1e-5)
        # The start is drawn: it is not zero-shot.
        assert not torch.allclose(method(images), create_method("zeroshot", tiny_backbone, NAMES)(images), atol=1e-3)


@pytest.mark.parametrize("silent", ["ratio", "second layer"])
def test_clip_adapter_without_effect_is_zero_shot(silent: str, tiny_backbone: Backbone, tiny_clip: Any) -> None:
    images = torch.from_numpy(tiny_clip.draw_images("adapter", 3, 64))
    method: Any = create_method("clip_adapter", tiny_backbone, NAMES, **({"ratio": 0.0} if silent == "ratio" else {}))
    if silent == "second layer":
        torch.nn.init.zeros_(method.adapter.up.weight)
    expected = create_method("zeroshot", tiny_backbone, NAMES)(images)
    torch.testing.assert_close(method(images), expected, rtol=1e-5, atol=1e-4)


def test_clip_adapter_trains_on_kept_features_and_moves_the_image_side(tiny_backbone: Backbone, tiny_clip: Any) -> None:
    images = torch.from_numpy(tiny_clip.draw_images("adapter", 3, 64))
    labels = torch.tensor([0, 1, 2])
    method = create_method("clip_adapter", tiny_backbone, NAMES)
    assert not method.needs.images and method.sees_images and not method.has_text_prompts()
    gradients = []
    for inputs in (images, tiny_backbone.encode_image(images)):
        method.zero_grad()
        method.losses(inputs, labels)["ce"].backward()
        gradients.append(
            [parameter.grad.clone() for _, parameter in method.trainable_parameters() if parameter.grad is not None]
        )
    assert len(gradients[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- TaskRes ----------------------------------------------------------------------------------------------------------
def test_taskres_adds_to_the_raw_text_feature(tiny_backbone: Backbone) -> None:
    templates = ["a photo of a {}.", "art of the {}."]
    training = {"epochs": 4, "lr": 0.5}
    method: Any = create_method("taskres", tiny_backbone, NAMES, templates=templates, views=0, training=training)
    raw = method.cache.raw_text
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(method.text_features(), F.normalize(raw, dim=-1))
    shots = shots_of(raw)
    method.fit(shots)
    expected = F.normalize(raw + 0.5 * method.cache.residual, dim=-1)
    torch.testing.assert_close(method.text_features(), expected)
    logits = tiny_backbone.logit_scale * F.normalize(shots.val, dim=-1) @ expected.t()
    torch.testing.assert_close(method(shots.val), logits)
    other = method.with_classes([NAMES[2], NAMES[0]])
    torch.testing.assert_close(other.text_features(), expected[[2, 0]], rtol=1e-4, atol=1e-5)


# -- linear probe, LP++ -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear_probe", "lp_plus_plus"])
def test_what_is_chosen_on_validation_images_needs_them(name: str, tiny_backbone: Backbone) -> None:
    text = create_method("zeroshot", tiny_backbone, NAMES).text_features()

    def fitted(val: int = 9, **own: Any) -> Any:
        method = create_method(name, tiny_backbone, NAMES, **own)
        method.fit(shots_of(text, val=val))
        return method

    blind, still, searched = fitted(val=0).trained_state(), fitted(search=False).trained_state(), fitted()
    assert all(torch.equal(value, still[key]) for key, value in blind.items())
    if name == "linear_probe":  # LP++ keeps the last of equally good iterations, which are many here
        assert float(searched.cache.c) != pytest.approx(float(still["cache.c"]))
    shots = shots_of(text)
    assert searched.cache.score(shots.val, shots.val_labels) > 0.9


def test_settings_reach_the_mathematics(tiny_backbone: Backbone) -> None:
    own = {"normalised": True, "start": "zeroshot"}
    probe: Any = create_method("linear_probe", tiny_backbone, NAMES, c=3.0, iterations=7, **own)
    assert (float(probe.cache.c), probe.cache.settings.start, probe.cache.settings.iterations) == (3.0, "zeroshot", 7)
    blend: Any = create_method("lp_plus_plus", tiny_backbone, NAMES, accumulate=False, alpha_every=3, momentum=0.5)
    assert (False, 3, 0.5) == (
        blend.cache.settings.accumulate,
        blend.cache.settings.alpha_every,
        blend.cache.settings.momentum,
    )
    training = {"epochs": 9, "lr": 0.3, "warmup_epochs": 2, "weight_decay": 0.0}
    residual: Any = create_method("taskres", tiny_backbone, NAMES, training=training)
    recipe = residual.cache.settings.training
    assert (recipe.epochs, recipe.lr, recipe.warmup_epochs, recipe.weight_decay) == (9, 0.3, 2, 0.0)
