"""What the prompt learners become where a part of them does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.config.run import RecipeConfig
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import BackboneError, ConfigError
from vlprompt.methods import PromptMethod

NAMES = ["cat", "annual crop land", "aeroplane"]
LABELS = torch.tensor([0, 1, 2, 0])
WORDS = "a photo of a"


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("degenerate", 4, 64))


def make(backbone: Backbone, name: str, **settings: Any) -> PromptMethod:
    torch.manual_seed(0)
    return create_method(name, backbone, NAMES, **settings)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_words_alone_are_zero_shot(tiny_backbone: Backbone, images: Tensor) -> None:
    expected = make(tiny_backbone, "zeroshot")(images)
    for name in ("coop", "kgcoop"):
        close(make(tiny_backbone, name, context_init=WORDS)(images), expected)
    close(make(tiny_backbone, "ivlp", context_init=WORDS, text_depth=1, image_depth=0)(images), expected)
    close(make(tiny_backbone, "prograd", context_init="template", context_length=4)(images), expected)


def test_a_silent_meta_network_is_coop(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "cocoop", context_init=WORDS)
    with torch.no_grad():
        method.meta_net.linear2.weight.zero_()  # type: ignore[union-attr, operator]
        method.meta_net.linear2.bias.zero_()  # type: ignore[union-attr, operator]
    close(method(images), make(tiny_backbone, "coop", context_init=WORDS)(images))
    close(method.text_features(), make(tiny_backbone, "coop", context_init=WORDS).text_features())


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_cocoop_does_not_depend_on_how_many_images_are_encoded_together(
    at_once: int, tiny_backbone: Backbone, images: Tensor
) -> None:
    reference, method = make(tiny_backbone, "cocoop"), make(tiny_backbone, "cocoop", images_at_once=at_once)
    for one in (reference, method):
        torch.stack(list(one.losses(images, LABELS).values())).sum().backward()
    for (name, expected), (_, found) in zip(
        reference.trainable_parameters(), method.trainable_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_knowledge_and_regularisers_are_silent_at_the_frozen_model(tiny_backbone: Backbone, images: Tensor) -> None:
    terms = make(tiny_backbone, "kgcoop", context_init=WORDS).losses(images, LABELS)
    assert abs(float(terms["knowledge"].detach())) < 1e-5
    settings = {"templates": ["a photo of a {}."]}
    method = make(
        tiny_backbone,
        "ivlp",
        context_init=WORDS,
        text_depth=1,
        image_depth=0,
        objectives={"self_regularisation": settings},
    )
    terms = method.losses(images, LABELS)
    assert set(terms) == {"ce", "scl_text", "scl_logits"}  # nothing is learned on the image side: no image term
    assert all(abs(float(terms[name].detach())) < 1e-4 for name in ("scl_text", "scl_logits"))


def test_deep_prompts_replace_and_the_sequence_does_not_grow(tiny_backbone: Backbone, images: Tensor) -> None:
    """With fresh tokens at layer 1, those of the input are seen by the first layer alone."""
    method = make(tiny_backbone, "vpt", image_tokens=3, image_depth=2)
    lengths = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
        for block in tiny_backbone.model.visual.transformer.resblocks
    ]
    method(images)
    for hook in hooks:
        hook.remove()
    assert set(lengths) == {1 + 16 + 3}
    before = method(images)
    with torch.no_grad():
        method.visual.deep[0].normal_()  # type: ignore[union-attr, index]
    assert not torch.allclose(method(images), before)


def test_depth_beyond_the_tower_means_all_of_it(tiny_backbone: Backbone) -> None:
    layers = tiny_backbone.image.layers
    assert len(make(tiny_backbone, "vpt", image_depth=99).visual.deep) == layers - 1  # type: ignore[union-attr, arg-type]
    for name, setting in (("vpt", "image_depth"), ("maple", "depth"), ("ivlp", "text_depth")):
        with pytest.raises(ConfigError, match=f"settings.{setting} is 0; accepted: a whole number of 1 or more"):
            make(tiny_backbone, name, **{setting: 0})


def test_maple_projections_start_alike_and_the_first_has_its_own(tiny_backbone: Backbone) -> None:
    prompts = make(tiny_backbone, "maple", depth=3).prompts
    first, second = prompts.projections  # type: ignore[union-attr, misc]
    assert torch.equal(first.weight, second.weight) and first.weight is not second.weight
    assert not torch.equal(first.weight, prompts.proj.weight)  # type: ignore[union-attr]


def test_prograds_words_stand_at_the_right(tiny_backbone: Backbone) -> None:
    """The comma is a token of its own but no word: the last word stays before the name as it is."""
    template = {"templates": ["a type of pet, a photo of a {}."]}
    method = make(tiny_backbone, "prograd", context_init="template", projected_gradient=template, context_length=16)
    context = method.prompt.ctx.detach()  # type: ignore[union-attr, operator]
    assert bool((context[:8] == 0).all()) and bool((context[8:].norm(dim=-1) > 0).all())
    text = tiny_backbone.text
    assert torch.equal(context[8:], text.embed(text.tokens("a type of pet, a photo of")[1:-1][:8]))
    slots = method.layout.slots[0, 0].tolist()  # type: ignore[union-attr, operator]
    assert slots[17] == text.tokens("a")[1]
    with pytest.raises(ConfigError, match="has 8 words but settings.context_length is 4"):
        make(tiny_backbone, "prograd", context_init="template", projected_gradient=template, context_length=4)


def test_image_tokens_need_a_vision_transformer() -> None:
    from vlprompt import load_backbone

    resnet = load_backbone("demo-rn")
    for name in ("vpt", "ivlp", "maple", "promptsrc", "restore", "clip_lora", "apt_approximated"):
        with pytest.raises(BackboneError, match="has no extra image tokens.*ModifiedResNet"):
            create_method(name, resnet, NAMES)
    for name in ("coop", "cocoop", "kgcoop", "prograd", "ramt"):
        assert create_method(name, resnet, NAMES).trainable_parameters()


def test_schedules_are_the_published_ones() -> None:
    """Dassl (dassl/optim/lr_scheduler.py): the first epoch at 1e-5, then the cosine from its own start."""
    for epochs, lr, expected in (
        (2, 0.0026, [1e-5, 0.0026]),
        (5, 0.0035, [1e-5, 0.0035, 0.0031658, 0.0022908, 0.0012092]),
        (20, 0.0025, [1e-5, 0.0025, 0.0024846]),
    ):
        recipe = RecipeConfig(epochs=epochs, lr=lr)
        found = [learning_rate(epoch, lr, recipe) for epoch in range(len(expected))]
        assert found == pytest.approx(expected, rel=1e-4)
