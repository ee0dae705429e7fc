"""Unified prompts: what meets in the shared block and what does not, and what they are where it does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt import create_method
from vlprompt.backbone import Backbone, VisualTokens
from vlprompt.prompts import UnifiedPrompts
from vlprompt.prompts.zero_shot import template_features

NAMES = ["cat", "annual crop land", "sea_lake"]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("unified", 3, 64))


def prompts_of(backbone: Backbone, *, mixing: bool, width: int = 32) -> UnifiedPrompts:
    torch.manual_seed(0)
    return UnifiedPrompts(backbone.text, backbone.image, 3, 2, 99, width, mixing=mixing)


def all_of(prompts: UnifiedPrompts) -> Tensor:
    """Every projected prompt, one a row: the context, then the image tokens layer by layer."""
    tokens = prompts.tokens()
    assert tokens.input is not None
    with torch.no_grad():
        return torch.cat([prompts.vectors(), tokens.input, *tokens.deep.values()])


@pytest.mark.parametrize("row", [0, 2, 3, 10])
def test_only_with_mixing_does_a_prompt_see_the_others(tiny_backbone: Backbone, row: int) -> None:
    for mixing in (False, True):
        prompts = prompts_of(tiny_backbone, mixing=mixing)
        before = all_of(prompts)
        with torch.no_grad():
            own = prompts.context.ctx if row < 3 else prompts.visual.flatten(0, 1)
            own[row if row < 3 else row - 3] += 1.0
        changed = (all_of(prompts) != before).any(dim=-1)
        assert changed[row] and bool(changed.all() if mixing else changed.sum() == 1)


def test_without_mixing_the_block_is_the_same_function_of_every_prompt(tiny_backbone: Backbone) -> None:
    """One token attends to itself alone, with weight 1: value and output map are all that attention does."""
    prompts = prompts_of(tiny_backbone, mixing=False)
    block, x = prompts.block, prompts.image_pre(prompts.visual.flatten(0, 1))
    attention: Any = block.attn
    value = F.linear(block.ln_1(x), attention.in_proj_weight[64:], attention.in_proj_bias[64:])
    x = x + attention.out_proj(value)
    hidden: Any = block.mlp
    inner = hidden.c_fc(block.ln_2(x))
    x = x + hidden.c_proj(inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(prompts.image_post(x), all_of(prompts)[3:], rtol=1e-5, atol=1e-6)


def test_towers_of_the_blocks_width_have_no_maps(tiny_backbone: Backbone) -> None:
    prompts = prompts_of(tiny_backbone, mixing=False, width=128)
    assert all(isinstance(part, nn.Identity) for part in (prompts.text_pre, prompts.image_post))
    assert {name.partition(".")[0] for name, _ in prompts.named_parameters()} == {"context", "visual", "block"}


def test_an_idle_block_leaves_coop_and_deep_image_tokens(tiny_backbone: Backbone, images: Tensor) -> None:
    method = create_method("upt", tiny_backbone, NAMES)
    prompts: Any = method.prompts
    with torch.no_grad():  # residual branches that add nothing, in a block of the towers' own width
        for layer in (prompts.block.attn.out_proj, prompts.block.mlp.c_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    coop = create_method("coop", tiny_backbone, NAMES, context_length=4, class_token_position="middle")
    coop.load_trained_state({"prompt.ctx": prompts.context.ctx})
    torch.testing.assert_close(method.text_features(), coop.text_features())
    first, *deep = prompts.visual
    tokens = VisualTokens(first, dict(enumerate(deep, 1)), position="after_class", before_ln_pre=False)
    torch.testing.assert_close(method.image_features(images), tiny_backbone.encode_image(images, tokens))


def test_image_tokens_start_uniform_by_the_patch_and_the_width(tiny_backbone: Backbone) -> None:
    bound = (6 / (3 * 16 * 16 + 128)) ** 0.5
    drawn = UnifiedPrompts(tiny_backbone.text, tiny_backbone.image, 3, 500, 99, 32, mixing=False).visual.detach()
    assert drawn.shape == (4, 500, 128)
    assert 0.99 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.01)


def test_classes_of_several_tasks_do_not_see_each_other(tiny_backbone: Backbone, images: Tensor) -> None:
    """Learning tasks together is learning all their classes; a slice of the logits is the task by itself."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="same tokens"):
        both = create_method("upt", tiny_backbone, [*NAMES, NAMES[0].upper()], variant="paper").eval()
    with torch.no_grad():
        torch.testing.assert_close(both.with_classes(NAMES)(images), both(images)[:, :3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both(images)[:, 3], both(images)[:, 0], rtol=1e-5, atol=1e-5)
    frozen = template_features(tiny_backbone, NAMES, ["a photo of a {}."])
    assert not torch.allclose(both.text_features()[:3], frozen, atol=1e-2)
