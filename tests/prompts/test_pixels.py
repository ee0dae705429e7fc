"""Pixel prompts: where they stand, that transformers may fold them, and that moving patches can be drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt import create_method, load_backbone, load_head
from vlprompt.backbone import Backbone
from vlprompt.errors import ConfigError
from vlprompt.io.head import Head
from vlprompt.prompts import PixelPrompt

NAMES = ["cat", "red_apple", "sea_lake"]
SHAPES = ("border", "fixed_patch", "random_patch")


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("pixels", 4, 64))


def prompt_of(shape: str, size: int = 5, side: int = 64, seed: int = 0) -> PixelPrompt:
    torch.manual_seed(seed)
    return PixelPrompt(side, size, shape)  # type: ignore[arg-type]


def test_the_border_has_the_published_numbers_and_leaves_the_inside_alone() -> None:
    prompt = prompt_of("border", 30, 224)
    assert sum(p.numel() for p in prompt.parameters()) == 69_840
    pixels = prompt.pixels().detach()
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[30:-30, 30:-30] = True
    assert pixels.shape == (3, 224, 224)
    assert bool((pixels[:, inside] == 0).all()) and bool((pixels[:, ~inside] != 0).all())
    assert torch.equal(pixels[:, :30], prompt.up) and torch.equal(pixels[:, 30:-30, -30:], prompt.right)
    assert torch.equal(pixels[:, -30:], prompt.down) and torch.equal(pixels[:, 30:-30, :30], prompt.left)
    assert float(pixels[:, ~inside].std()) == pytest.approx(1, abs=0.02)


def test_a_fixed_patch_stands_at_the_top_left() -> None:
    prompt = prompt_of("fixed_patch", 7)
    pixels = prompt.pixels().detach().clone()
    assert torch.equal(pixels[:, :7, :7], prompt.patch)
    pixels[:, :7, :7] = 0
    assert not pixels.any()


def test_a_moving_patch_reaches_every_place_but_the_last_row_and_column() -> None:
    prompt = prompt_of("random_patch", 5, 9).train()
    places = [prompt.corner() for _ in range(400)]
    assert set(places) == {(row, column) for row in range(4) for column in range(4)}
    row, column = prompt.eval().corner()
    assert torch.equal(prompt.pixels()[:, row : row + 5, column : column + 5], prompt.patch)


def test_places_depend_on_seed_and_step_and_go_on_after_a_checkpoint() -> None:
    first, again, other = (prompt_of("random_patch", seed=seed).train() for seed in (3, 3, 4))
    drawn = [first.corner() for _ in range(12)]
    assert [again.corner() for _ in range(6)] == drawn[:6] and [other.corner() for _ in range(12)] != drawn
    torch.rand(100)  # other draws in between change nothing
    resumed = prompt_of("random_patch", seed=5).train()
    resumed.load_state_dict(again.state_dict())
    assert [resumed.corner() for _ in range(6)] == drawn[6:]
    # Evaluation neither moves the patch nor uses a draw up.
    assert len({prompt.eval().corner() for prompt in (first, other) for _ in range(3)}) == 1
    assert first.draws.seed_and_count[1] == 12


@pytest.mark.parametrize("shape", SHAPES)
def test_folded_into_the_tower_is_added_to_the_pixels(tiny_backbone: Backbone, images: Tensor, shape: str) -> None:
    tower, prompt = tiny_backbone.image, prompt_of(shape).eval()
    found, expected = prompt.encode(tower, images), tower.encode(images + prompt.pixels())
    assert float((found - expected).detach().abs().max() / expected.abs().max()) < 1e-5
    gradients = []
    for features in (found, expected):
        prompt.zero_grad()
        features.square().sum().backward()
        gradients.append([p.grad for p in prompt.parameters()])
    for own, other in zip(*gradients, strict=True):
        assert float((own - other).abs().max() / other.abs().max()) < 1e-4
    assert tower.folded(prompt.pixels()).keys() == {"positional_embedding"}  # type: ignore[union-attr]


def test_a_prompt_of_zeros_is_zero_shot(tiny_backbone: Backbone, images: Tensor) -> None:
    method = create_method("visual_prompt", tiny_backbone, ["cat", "sea_lake"])
    zeroshot = create_method("zeroshot", tiny_backbone, ["cat", "sea_lake"], templates=["This is a photo of a {}"])
    assert not torch.allclose(method(images), zeroshot(images), atol=1e-2)
    with torch.no_grad():
        for _, parameter in method.trainable_parameters():
            parameter.zero_()
    torch.testing.assert_close(method(images), zeroshot(images), rtol=1e-5, atol=1e-5)


def test_hyphens_are_spaces_in_the_text(tiny_backbone: Backbone) -> None:
    one, other = (create_method("visual_prompt", tiny_backbone, [name]) for name in ("pickup-truck", "Pickup_truck"))
    assert torch.equal(one.text_features(), other.text_features())
    kept = create_method("visual_prompt", tiny_backbone, ["pickup-truck"], split_hyphens=False)
    assert not torch.equal(one.text_features(), kept.text_features())


def test_an_empty_template_is_the_data_sets(tiny_backbone: Backbone) -> None:
    """BlackVIP's runs of VP; a single template may be given without a list, as heads of earlier versions have it."""
    own = create_method("visual_prompt", tiny_backbone, NAMES, data_template="{} texture.", template=[])
    given = create_method("visual_prompt", tiny_backbone, NAMES, template="{} texture.")
    assert own.settings_dict()["template"] == given.settings_dict()["template"] == ("{} texture.",)
    assert torch.equal(own.text_features(), given.text_features())
    assert not torch.equal(create_method("visual_prompt", tiny_backbone, NAMES).text_features(), own.text_features())
    texts = {name: [f"a {name}"] for name in [*NAMES, "pickup-truck"]}
    named = create_method("visual_prompt", tiny_backbone, ["pickup-truck"], template=texts)
    plain = create_method("visual_prompt", tiny_backbone, ["pickup-truck"], template="a {}", split_hyphens=False)
    assert torch.equal(named.text_features(), plain.text_features())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_resnet_takes_pixels_too(shape: str, tmp_path: Any) -> None:
    backbone = load_backbone("demo-rn")
    method = create_method("visual_prompt", backbone, NAMES, shape=shape, prompt_size=8).train()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert backbone.image.folded(torch.zeros(3, 64, 64)) is None
    torch.stack(list(method.losses(images, torch.arange(3)).values())).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for _, p in method.trainable_parameters())  # type: ignore[union-attr]
    method.eval()
    with torch.no_grad():
        expected = method(images)
        assert torch.equal(method.image_features(images), backbone.encode_image(images + method.prompt.pixels()))  # type: ignore[union-attr, operator]
    Head(method).save_pretrained(tmp_path / "head")
    assert torch.equal(load_head(tmp_path / "head", backbone)(images), expected)


def test_an_attached_head_carries_its_pixels(tiny_backbone: Backbone, images: Tensor) -> None:
    head = Head(create_method("visual_prompt", tiny_backbone, NAMES))
    with torch.no_grad():
        found = head.attach(tiny_backbone.model).encode_image(images)  # type: ignore[operator]
        torch.testing.assert_close(found, head.method.image_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "size", "most"), [("border", 32, 31), ("fixed_patch", 64, 63)])
def test_prompts_that_do_not_fit_are_refused(tiny_backbone: Backbone, shape: str, size: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"settings.prompt_size is {size}; accepted: 1 to {most}"):
        create_method("visual_prompt", tiny_backbone, NAMES, shape=shape, prompt_size=size)
