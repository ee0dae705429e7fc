"""CoOp against its published assembly of embeddings, computed here the long way, and its degenerate forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.errors import ClassNameError, ConfigError

NAMES = ["golden_retriever", "jack-o'-lantern", "Boeing 737-200", "cat"]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("coop", 4, 64))


def published_features(backbone: Backbone, ctx: Tensor, position: str) -> Tensor:
    """Raw text features ``[C, D]``: padded embeddings put together as CoOp's trainers/coop.py describes them."""
    model, length = backbone.model, ctx.shape[-2]
    ids = backbone.text.tokenizer([f"{' '.join(['X'] * length)} {name.replace('_', ' ')}." for name in NAMES])
    embeddings = model.token_embedding(ids)
    rows = []
    for c, name in enumerate(NAMES):
        own = ctx[c] if ctx.ndim == 3 else ctx
        count = len(backbone.text.tokenizer.encode(name.replace("_", " ")))
        prefix, rest = embeddings[c, :1], embeddings[c, 1 + length :]
        words, tail = rest[:count], rest[count:]
        half = length // 2
        parts = {
            "end": [prefix, own, rest],
            "middle": [prefix, own[:half], words, own[half:], tail],
            "front": [prefix, words, own, tail],
        }[position]
        rows.append(torch.cat(parts))
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(NAMES)), ids.argmax(dim=-1)] @ model.text_projection


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("specific", [False, True])
def test_every_position_is_the_published_assembly(
    tiny_backbone: Backbone, images: Tensor, position: str, length: int, specific: bool
) -> None:
    torch.manual_seed(0)
    own = {"context_length": length, "class_token_position": position, "class_specific": specific}
    method = create_method("coop", tiny_backbone, NAMES, **own)
    ctx = method.prompt.ctx
    assert ctx.shape == ((4, length, 128) if specific else (length, 128))
    labels = torch.tensor([0, 1, 2, 3])
    sum(method.losses(method.image_features(images), labels).values()).backward()
    gradient = ctx.grad
    free = ctx.detach().clone().requires_grad_()
    weights = F.normalize(published_features(tiny_backbone, free, position), dim=-1)
    unit = F.normalize(tiny_backbone.model.encode_image(images), dim=-1)
    logits = tiny_backbone.model.logit_scale.exp() * unit @ weights.t()
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(method(images), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, free.grad, rtol=1e-3, atol=1e-4 * float(free.grad.abs().max()))


def test_context_made_of_words_is_zero_shot_with_the_template(tiny_backbone: Backbone, images: Tensor) -> None:
    coop = create_method("coop", tiny_backbone, NAMES, context_init="a photo of a")
    zero_shot = create_method("zeroshot", tiny_backbone, NAMES, templates=["a photo of a {}."])
    torch.testing.assert_close(coop(images), zero_shot(images), rtol=1e-5, atol=1e-5)


def test_parameter_counts_are_the_published_ones(tiny_state_dict: Any) -> None:
    wide = Backbone.from_state_dict(tiny_state_dict(text_width=512, text_layers=1, vision_layers=1))
    for own, count in (
        ({}, 16 * 512),
        ({"context_length": 4}, 2048),
        ({"context_init": "a photo of a"}, 2048),
        ({"class_specific": True}, 4 * 16 * 512),
    ):
        method = create_method("coop", wide, NAMES, **own)
        assert [name for name, _ in method.trainable_parameters()] == ["prompt.ctx"]
        assert sum(p.numel() for _, p in method.trainable_parameters()) == count


def test_words_override_length_and_class_specific(tiny_backbone: Backbone) -> None:
    own = {"context_init": "a photo of a", "context_length": 16, "class_specific": True}
    assert create_method("coop", tiny_backbone, NAMES, **own).prompt.ctx.shape == (4, 128)


def test_class_specific_context_serves_its_own_classes_only(tiny_backbone: Backbone, images: Tensor) -> None:
    method = create_method("coop", tiny_backbone, NAMES, class_specific=True)
    with pytest.raises(ClassNameError, match="class_specific"):
        method.with_classes(["cat", "dog"])
    with pytest.raises(ClassNameError, match="class_specific"):
        method.with_classes(NAMES[::-1])
    assert torch.equal(method.with_classes(NAMES)(images), method(images))


def test_context_of_one_class_moves_that_class_alone(tiny_backbone: Backbone) -> None:
    method = create_method("coop", tiny_backbone, NAMES, class_specific=True, context_length=2)
    before = method.text_features().detach()
    with torch.no_grad():
        method.prompt.ctx[2] += torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    moved = (method.text_features().detach() - before).abs().amax(dim=-1)
    assert float(moved[2]) > 1e-3 and float(moved[[0, 1, 3]].max()) < 1e-6


@pytest.mark.parametrize(
    "own",
    [
        {"context_length": 0},
        {"context_length": -1},
        {"context_length": 75},
        {"context_length": "4"},
        {"context_length": 4.0},
        {"context_length": True},
        {"context_length": None},
        {"class_token_position": "behind"},
        {"class_token_position": None},
        {"class_specific": "true"},
        {"context_init": 4},
        {"context_init": "a  photo"},
        {"n_ctx": 4},
    ],
    ids=repr,
)
def test_malformed_settings_are_config_errors(tiny_backbone: Backbone, own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_method("coop", tiny_backbone, NAMES, **own)
    assert next(iter(own)) in str(caught.value)


def test_a_misspelt_position_is_told_the_nearest(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'middle'"):
        create_method("coop", tiny_backbone, NAMES, class_token_position="midle")


def test_names_that_do_not_fit_beside_the_context_are_all_listed(tiny_backbone: Backbone) -> None:
    names = ["x " * 70, "cat", "y " * 65]
    with pytest.raises(ClassNameError, match="2 of 3 class prompts") as caught:
        create_method("coop", tiny_backbone, names)
    assert "x x x" in str(caught.value) and "y y y" in str(caught.value)
    assert create_method("coop", tiny_backbone, names, context_length=4).layout.lengths.max() == 77
