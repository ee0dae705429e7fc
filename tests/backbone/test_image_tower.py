"""The image tower: agreement with open_clip without tokens and with the published VPT with tokens, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip import CLIP

from vlprompt.backbone import Backbone, VisualTokens
from vlprompt.backbone.image_tower import ImageTower
from vlprompt.errors import BackboneError

W, L = 128, 4
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
NOTHING = [
    VisualTokens(),
    VisualTokens(torch.zeros(0, W)),
    VisualTokens(torch.zeros(0, W), position="after_class", before_ln_pre=False),
    VisualTokens(torch.zeros(3, 0, W), {1: torch.zeros(3, 0, W)}),
]


def images(count=3, size=64, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(*shape, seed=1):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backbone_of(**vision):
    vision = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32, **vision}
    return Backbone.from_open_clip(CLIP(32, vision, TEXT), name="own")


# -- agreement with open_clip ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [None, *NOTHING])
def test_no_tokens_is_bit_identical_to_open_clip(tiny_backbone, tokens, grad):
    with torch.set_grad_enabled(grad):
        x = images().requires_grad_(grad)
        assert torch.equal(tiny_backbone.image.encode(x, tokens), tiny_backbone.model.visual(x))


@pytest.mark.parametrize(
    "vision", [{"no_ln_pre": True}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1}, {"qk_norm": True}]
)
def test_variants_of_the_vision_transformer_are_bit_identical(vision):
    backbone = backbone_of(**vision)
    x = images(2, 32)
    assert torch.equal(backbone.image.encode(x, VisualTokens()), backbone.model.visual(x))


def test_gradient_of_pixels_matches_open_clip(tiny_backbone):
    ours, theirs = images().requires_grad_(), images().requires_grad_()
    tiny_backbone.image.encode(ours, VisualTokens()).square().sum().backward()
    tiny_backbone.model.visual(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_tower_that_also_returns_patches_returns_features(tiny_backbone):
    backbone = backbone_of(output_tokens=True)
    x = images(2, 32)
    assert torch.equal(backbone.encode_image(x), backbone.model.visual(x)[0])


# -- golden ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["shallow", "deep", "deep_partial"])
def test_vpt_features_logits_and_gradients_match_the_published_code(tiny_backbone, golden, relative_error, case):
    arrays, _ = golden("vpt")
    start = f"{case}/param/image_encoder."
    params = {key[len(start) :]: value.requires_grad_() for key, value in arrays.items() if key.startswith(start)}
    deep = {int(name.split(".")[2]): value for name, value in params.items() if "resblocks" in name}
    features = tiny_backbone.encode_image(arrays["images"], VisualTokens(params["VPT"], deep))
    classes = F.normalize(arrays["text_features_raw"], dim=-1)
    logits = tiny_backbone.logit_scale * F.normalize(features, dim=-1) @ classes.t()
    loss = F.cross_entropy(logits, arrays["labels"])
    loss.backward()
    assert relative_error(features, arrays[f"{case}/image_features_raw"]) < 1e-4
    assert relative_error(logits, arrays[f"{case}/train_logits"]) < 1e-4
    assert relative_error(loss, arrays[f"{case}/loss/total"]) < 1e-4
    for name, value in params.items():
        assert relative_error(value.grad, arrays[f"{case}/grad/image_encoder.{name}"]) < 1e-4


def naive(visual, x, tokens):
    """Reference tower with explicit positions, sequence first as in the published code."""
    x = visual.conv1(x).flatten(2).permute(2, 0, 1)  # [N, B, W]
    cls = visual.class_embedding.view(1, 1, -1).expand(1, x.shape[1], -1)
    x = torch.cat([cls, x]) + visual.positional_embedding[:, None]
    count, extra = tokens.count, tokens.input
    extra = extra[:, None].expand(-1, x.shape[1], -1) if extra.ndim == 2 else extra.transpose(0, 1)
    if tokens.before_ln_pre:
        extra = visual.ln_pre(extra)
    x = visual.ln_pre(x)
    x = torch.cat([x[:1], extra, x[1:]]) if tokens.position == "after_class" else torch.cat([x, extra])
    slots = slice(1, 1 + count) if tokens.position == "after_class" else slice(len(x) - count, len(x))
    for index, block in enumerate(visual.transformer.resblocks):
        if index in tokens.deep:
            x = x.clone()
            new = tokens.deep[index]
            x[slots] = new[:, None] if new.ndim == 2 else new.transpose(0, 1)
        x = block(x.transpose(0, 1)).transpose(0, 1)
    return visual.ln_post(x[0]) @ visual.proj


@pytest.mark.parametrize("position", ["end", "after_class"])
@pytest.mark.parametrize("before_ln_pre", [True, False])
@pytest.mark.parametrize("layers", [[], [1, 2, 3], [2]])
def test_tokens_at_every_position_match_a_naive_tower(tiny_backbone, position, before_ln_pre, layers):
    tokens = VisualTokens(drawn(5, W), {i: drawn(5, W, seed=i) for i in layers}, position, before_ln_pre)
    expected = naive(tiny_backbone.model.visual, images(), tokens)
    torch.testing.assert_close(tiny_backbone.image.encode(images(), tokens), expected, rtol=1e-5, atol=1e-5)


def test_tokens_before_and_after_ln_pre_give_different_features(tiny_backbone):
    before_norm, after_norm = (VisualTokens(drawn(5, W), before_ln_pre=before) for before in (True, False))
    assert not torch.allclose(
        *(tiny_backbone.image.encode(images(), tokens) for tokens in (before_norm, after_norm)), atol=1e-3
    )


@pytest.mark.parametrize("position", ["end", "after_class"])
def test_tokens_per_image_affect_only_their_image(tiny_backbone, position):
    x, shallow, deep = images(), drawn(3, 2, W), drawn(3, 2, W, seed=2)
    together = tiny_backbone.image.encode(x, VisualTokens(shallow, {2: deep}, position))
    for i in range(3):
        alone = tiny_backbone.image.encode(x[i : i + 1], VisualTokens(shallow[i], {2: deep[i]}, position))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


# -- layer norms -------------------------------------------------------------------------------------------------------
def test_layer_norm_parameters_are_those_of_the_model(tiny_backbone):
    parameters = tiny_backbone.image.layer_norm_parameters()
    assert len(parameters) == L * 4
    assert (
        parameters["transformer.resblocks.2.ln_2.bias"] is tiny_backbone.model.visual.transformer.resblocks[2].ln_2.bias
    )
    assert set(tiny_backbone.image.layer_norm_parameters(["ln_1"])) == {name for name in parameters if ".ln_1." in name}


@pytest.mark.parametrize("tokens", [None, VisualTokens(drawn(2, W))])
def test_overrides_equal_changed_weights(tiny_state_dict, tokens):
    backbone = Backbone.from_state_dict(tiny_state_dict())
    overrides = {
        name: value.detach() + drawn(W, seed=7) for name, value in backbone.image.layer_norm_parameters().items()
    }
    plain = backbone.image.encode(images(), tokens)
    replaced = backbone.image.encode(images(), tokens, overrides)
    assert torch.equal(plain, backbone.image.encode(images(), tokens))  # the weights are unchanged
    with torch.no_grad():
        for name, value in overrides.items():
            backbone.model.visual.get_parameter(name).copy_(value)
    assert not torch.allclose(plain, replaced)
    assert torch.equal(replaced, backbone.image.encode(images(), tokens))


def test_overrides_receive_gradients_and_frozen_weights_do_not(tiny_backbone):
    norms = {n: v.detach().clone().requires_grad_() for n, v in tiny_backbone.image.layer_norm_parameters().items()}
    tiny_backbone.encode_image(images(), overrides=norms).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in norms.values())
    assert all(parameter.grad is None for parameter in tiny_backbone.parameters())


# -- precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_towers_accept_and_return_float32(tiny_backbone, tiny_state_dict, precision):
    narrow = Backbone.from_state_dict(tiny_state_dict(), precision=precision)
    prompt = drawn(2, W).requires_grad_()
    norms = {n: v.detach().float().requires_grad_() for n, v in narrow.image.layer_norm_parameters().items()}
    tokens = VisualTokens(prompt, {1: drawn(2, W)})
    features = narrow.encode_image(images(), tokens, norms)
    features.sum().backward()
    wide = tiny_backbone.encode_image(images(), tokens)
    assert narrow.image.dtype == narrow.model.visual.conv1.weight.dtype != torch.float32
    assert features.dtype == prompt.grad.dtype == torch.float32 and prompt.grad.abs().sum() > 0
    assert F.cosine_similarity(features, wide).min() > 0.995


def test_float64_backbone_returns_float64(tiny_state_dict, tiny_backbone):
    wide = Backbone.from_state_dict(tiny_state_dict()).double()
    features = wide.encode_image(images().double(), VisualTokens(drawn(2, W)))
    assert features.dtype == torch.float64 and wide.precision == "fp64"
    narrow = tiny_backbone.encode_image(images(), VisualTokens(drawn(2, W)))
    torch.testing.assert_close(features.float(), narrow, rtol=1e-4, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "fragments"),
    [
        (VisualTokens(drawn(2, 64)), ["input", "[2, 64]", "[2, 128]", "[3, 2, 128]"]),
        (VisualTokens(drawn(4, 2, W)), ["[4, 2, 128]"]),
        (VisualTokens(drawn(2, W), {2: drawn(3, W)}), ["layer 2", "[3, 128]"]),
        (VisualTokens(drawn(2, W), {4: drawn(2, W)}), ["layer 4", "1 to 3"]),
        (VisualTokens(drawn(2, W), {0: drawn(2, W)}), ["layer 0", "1 to 3"]),
        (VisualTokens(None, {1: drawn(2, W)}), ["replace input tokens"]),
        (VisualTokens(drawn(2, W), position="front"), ["'front'", "'after_class'"]),
    ],
)
def test_unsupported_tokens_are_refused(tiny_backbone, tokens, fragments):
    with pytest.raises(BackboneError) as caught:
        tiny_backbone.image.encode(images(), tokens)
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("wrong", "fragments"),
    [
        (torch.zeros(2, 3, 32, 32), ["32 x 32", "64 x 64", "backbone.preprocess"]),
        (torch.zeros(3, 64, 64), ["[B, 3, H, W]"]),
        (torch.zeros(2, 1, 64, 64), ["[2, 1, 64, 64]"]),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["torch.uint8"]),
    ],
)
def test_unsupported_images_are_refused(tiny_backbone, wrong, fragments):
    with pytest.raises(BackboneError) as caught:
        tiny_backbone.encode_image(wrong)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_unknown_or_misshapen_overrides_are_refused(tiny_backbone):
    wrong = {"transformer.resblocks.0.ln_3.weight": torch.ones(W), "ln_pre.weight": torch.ones(3)}
    with pytest.raises(BackboneError) as caught:
        tiny_backbone.encode_image(images(), overrides=wrong)
    assert "resblocks.0.ln_3.weight" in str(caught.value) and "Did you mean" in str(caught.value)
    assert "shape [3], expected [128]" in str(caught.value)
    with pytest.raises(BackboneError, match="no layer norm 'ln_9'"):
        tiny_backbone.image.layer_norm_parameters(["ln_9"])


def test_resnet_encodes_but_refuses_tokens_and_layer_norms():
    vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}
    backbone = Backbone.from_open_clip(CLIP(32, vision, TEXT), name="small-resnet")
    assert not backbone.capabilities.image_tokens and not backbone.capabilities.image_layer_norms
    assert torch.equal(backbone.encode_image(images()), backbone.model.visual(images()))
    for call in (
        lambda: backbone.encode_image(images(), VisualTokens(drawn(2, W))),
        backbone.image.require_tokens,
        backbone.image.layer_norm_parameters,
        lambda: backbone.image.layers,
    ):
        with pytest.raises(BackboneError) as caught:
            call()
        assert "small-resnet" in str(caught.value) and "'ViT-B-16'" in str(caught.value)


def test_tower_with_average_pooling_has_layer_norms_but_accepts_no_tokens():
    backbone = backbone_of(pool_type="avg")
    assert backbone.capabilities.image_layer_norms and not backbone.capabilities.image_tokens
    assert torch.equal(backbone.encode_image(images(2, 32)), backbone.model.visual(images(2, 32)))
    with pytest.raises(BackboneError, match="class token"):
        backbone.image.require_tokens()


def test_errors_of_a_tower_without_name_say_this_backbone(tiny_backbone):
    tower = ImageTower(tiny_backbone.model.visual)
    assert (tower.width, tower.layers, tower.takes_tokens) == (W, L, True)
    with pytest.raises(BackboneError, match="this backbone takes 64 x 64"):
        tower.encode(torch.zeros(1, 3, 8, 8))
