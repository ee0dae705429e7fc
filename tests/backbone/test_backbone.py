"""Backbone: agreement with OpenAI's code, frozen weights, fingerprint and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP, SimpleTokenizer
from torch import nn

from vlprompt.backbone import Backbone, Preprocess
from vlprompt.errors import BackboneError

VISION = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
SMALL = {"text_width": 64, "vision_width": 64, "text_layers": 1, "vision_layers": 1}


# -- golden ------------------------------------------------------------------------------------------------------------
def test_weight_rule_gives_the_golden_weights(tiny_clip, tiny_state_dict, golden):
    _, meta = golden("clip_core")
    assert tiny_clip.checksum(tiny_state_dict(meta["weights_seed"], **meta["dims"])) == meta["weights_sha256"]


def test_clip_core_matches_openais_code(tiny_backbone, golden, relative_error):
    arrays, meta = golden("clip_core")
    tokenizer = tiny_backbone.text.tokenizer
    assert torch.equal(tokenizer(meta["texts"]).int(), arrays["tokens"])
    images = arrays["images"].requires_grad_()
    features = tiny_backbone.encode_image(images)
    texts = tiny_backbone.model.encode_text(arrays["tokens"].long())
    logits = tiny_backbone.logit_scale * F.normalize(features, dim=-1) @ F.normalize(texts, dim=-1).t()
    (logits * arrays["cotangent"]).sum().backward()
    assert relative_error(features, arrays["image_features_raw"]) < 1e-4
    assert relative_error(texts, arrays["text_features_raw"]) < 1e-4
    assert relative_error(logits, arrays["logits_per_image"]) < 1e-4
    assert relative_error(images.grad, arrays["grad_images"]) < 1e-4


# -- frozen ------------------------------------------------------------------------------------------------------------
def test_backbone_stays_frozen_and_in_evaluation_mode():
    model = CLIP(32, {**VISION, "patch_dropout": 0.5}, TEXT).train()
    backbone = Backbone.from_open_clip(model, name="own")
    parent = nn.Module()
    parent.backbone = backbone
    parent.train()
    assert parent.training and not any(module.training for module in backbone.modules())
    assert backbone.train(True) is backbone
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.encode_image(x), backbone.encode_image(x))


def test_batch_statistics_of_a_resnet_stay_fixed():
    vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}
    backbone = Backbone.from_open_clip(CLIP(32, vision, TEXT), name="own").train()
    before = copy.deepcopy(backbone.state_dict())
    backbone.encode_image(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_towers_add_no_second_copy_of_the_weights(tiny_backbone):
    names = list(tiny_backbone.state_dict())
    assert all(name.startswith("model.") for name in names)
    assert len(names) == len(tiny_backbone.model.state_dict())


def test_deep_copy_is_complete_and_independent(tiny_backbone):
    copied = copy.deepcopy(tiny_backbone)
    assert copied.image.visual is copied.model.visual is not tiny_backbone.model.visual
    assert copied.text.model is copied.model
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(copied.encode_image(x), tiny_backbone.encode_image(x))


# -- facts -------------------------------------------------------------------------------------------------------------
def test_facts_of_the_tiny_backbone(tiny_backbone):
    assert (tiny_backbone.embed_dim, tiny_backbone.text_width, tiny_backbone.precision) == (64, 128, "fp32")
    assert tiny_backbone.preprocess.size == 64 and tiny_backbone.preprocess.interpolation == "bicubic"
    assert tiny_backbone.logit_scale.shape == () and tiny_backbone.logit_scale.item() == pytest.approx(1 / 0.07)
    assert not tiny_backbone.logit_scale.requires_grad
    capabilities = tiny_backbone.capabilities
    assert capabilities.causal_text and capabilities.token_prompts
    assert capabilities.image_tokens and capabilities.image_layer_norms
    assert tiny_backbone.device == torch.device("cpu") and "'tiny'" in repr(tiny_backbone)
    assert tiny_backbone.untrained_tokens("an unheard-of xyzzy") == []


def test_building_changes_neither_random_state_nor_input_tensors(tiny_state_dict):
    state = tiny_state_dict(**SMALL)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    before = torch.get_rng_state()
    backbone = Backbone.from_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        backbone.model.ln_final.weight.zero_()
    assert all(torch.equal(state[name], kept[name]) for name in kept) and state.keys() == kept.keys()


def test_fingerprint_covers_weights_activation_and_heads(tiny_state_dict):
    state = tiny_state_dict(**SMALL)
    same = Backbone.from_state_dict(state).fingerprint
    assert len(same) == 64 and Backbone.from_state_dict(state, name="other", pretrained="x").fingerprint == same
    assert Backbone.from_state_dict(state, quick_gelu=False).fingerprint != same
    assert Backbone.from_state_dict(state, precision="bf16").fingerprint != same
    changed = {**state, "visual.proj": state["visual.proj"].clone()}
    changed["visual.proj"][0, 0] += 1e-3
    backbone = Backbone.from_state_dict(changed)
    assert backbone.fingerprint != same and backbone.fingerprint == backbone.fingerprint
    first, second = (Backbone.from_open_clip(CLIP(32, VISION, {**TEXT, "heads": h}), name="own") for h in (1, 2))
    second.model.load_state_dict(first.model.state_dict())
    assert first.fingerprint != second.fingerprint


def test_precision_keeps_layer_norms_and_embeddings_wide(tiny_state_dict):
    backbone = Backbone.from_state_dict(tiny_state_dict(**SMALL), precision="bf16")
    model = backbone.model
    narrow = [model.visual.conv1.weight, model.visual.proj, model.text_projection]
    narrow.append(model.transformer.resblocks[0].attn.in_proj_weight)
    assert {tensor.dtype for tensor in narrow} == {torch.bfloat16} and backbone.precision == "bf16"
    assert model.ln_final.weight.dtype == model.token_embedding.weight.dtype == torch.float32
    assert backbone.logit_scale.dtype == torch.float32
    with pytest.raises(BackboneError, match="fp32, fp16, bf16"):
        Backbone.from_state_dict(tiny_state_dict(**SMALL), precision="fp8")


# -- a given open_clip model -------------------------------------------------------------------------------------------
def test_from_open_clip_uses_the_constants_of_the_model():
    model = CLIP(32, VISION, TEXT)
    model.visual.preprocess_cfg = {"size": 32, "mean": [0.5] * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    assert Backbone.from_open_clip(model, name="own").preprocess == Preprocess(
        32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "squash"
    )
    preprocess = Preprocess(32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bilinear")
    assert Backbone.from_open_clip(model, name="own", preprocess=preprocess).preprocess == preprocess


def test_custom_text_layout_is_supported():
    backbone = Backbone.from_open_clip(CustomTextCLIP(32, VISION, TEXT), name="own")
    assert backbone.text.model is backbone.model.text and backbone.embed_dim == 32
    assert backbone.capabilities.causal_text


def test_non_causal_text_is_supported_and_reported():
    backbone = Backbone.from_open_clip(CLIP(32, VISION, {**TEXT, "no_causal_mask": True}), name="own")
    assert not backbone.capabilities.causal_text and backbone.capabilities.token_prompts


def test_pooling_by_the_tokenizers_end_of_text_id_is_supported():
    backbone = Backbone.from_open_clip(CLIP(32, VISION, {**TEXT, "pool_type": "eos", "eos_id": 49407}), name="own")
    assert backbone.model.text_pool_type == "eos"


@pytest.mark.parametrize(
    ("text", "custom", "message"),
    [
        ({"pool_type": "last"}, False, "pools 'last'"),
        ({"pool_type": "first"}, True, "pools 'first'"),
        ({"pool_type": "eos", "eos_id": 2}, False, "token 2"),
        ({"embed_cls": True}, True, "class token"),
        ({"vocab_size": 1000}, False, "1000 token embeddings"),
    ],
)
def test_text_towers_that_pool_elsewhere_are_refused(text, custom, message):
    model = (CustomTextCLIP if custom else CLIP)(32, VISION, {**TEXT, **text})
    with pytest.raises(BackboneError) as caught:
        Backbone.from_open_clip(model, name="odd-one")
    assert message in str(caught.value) and "odd-one" in str(caught.value) and "ViT-B-16" in str(caught.value)


def test_unsupported_tokenizers_and_models_are_refused():
    tokenizer = SimpleTokenizer(additional_special_tokens=["<extra>"])
    with pytest.raises(BackboneError, match="larger ids than end-of-text"):
        Backbone.from_open_clip(CLIP(32, VISION, {**TEXT, "vocab_size": 49409}), name="own", tokenizer=tokenizer)
    with pytest.raises(BackboneError, match="its tokenizer is a object"):
        Backbone.from_open_clip(CLIP(32, VISION, TEXT), name="own", tokenizer=object())
    with pytest.raises(BackboneError, match="a Linear is not an open_clip CLIP"):
        Backbone.from_open_clip(nn.Linear(2, 2), name="own")


# -- state dicts -------------------------------------------------------------------------------------------------------
def test_architecture_of_a_resnet_is_read_from_its_state_dict():
    vision = {"layers": (1, 2, 1, 1), "width": 16, "head_width": 32, "image_size": 64}
    with pytest.raises(BackboneError, match="multiples of 64"):  # no release is that narrow
        Backbone.from_state_dict(CLIP(32, vision, TEXT).state_dict())
    vision = {"layers": (1, 2, 1, 1), "width": 64, "image_size": 64}
    model = CLIP(32, vision, TEXT, quick_gelu=True).eval()
    backbone = Backbone.from_state_dict(model.state_dict(), name="rn")
    x = torch.randn(2, 3, 64, 64)
    assert backbone.preprocess.size == 64 and torch.equal(backbone.encode_image(x), model.visual(x))


def test_activation_is_openais_by_default(tiny_state_dict):
    state, x = tiny_state_dict(**SMALL), torch.randn(1, 3, 64, 64)
    quick, plain = Backbone.from_state_dict(state), Backbone.from_state_dict(state, quick_gelu=False)
    assert type(quick.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(plain.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert not torch.allclose(quick.encode_image(x), plain.encode_image(x), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln_final.weight"), "no 'ln_final.weight'"),
        (lambda s: s.pop("visual.positional_embedding"), "visual.positional_embedding"),
        (lambda s: s.pop("visual.ln_post.bias"), "missing: visual.ln_post.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"visual.proj": torch.zeros(64, 63)}), "visual.proj: shape [64, 63], expected [64, 64]"),
        (lambda s: s.update({"visual.positional_embedding": torch.zeros(16, 64)}), "square grid"),
        (lambda s: s.update({"ln_final.weight": torch.zeros(60)}), "multiples of 64"),
        (lambda s: [s.pop(k) for k in list(s) if ".resblocks.0." in k], "0 layers"),
    ],
)
def test_mismatched_state_dicts_are_refused(tiny_state_dict, change, message):
    state = tiny_state_dict(**SMALL)
    change(state)
    with pytest.raises(BackboneError) as caught:
        Backbone.from_state_dict(state, pretrained="given.pt")
    assert message in str(caught.value) and "given.pt" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


def test_block_missing_in_the_middle_is_reported(tiny_state_dict):
    state = tiny_state_dict()
    state = {name: value for name, value in state.items() if "visual.transformer.resblocks.1." not in name}
    with pytest.raises(BackboneError, match=r"12 tensors missing(.|\n)*visual\.transformer\.resblocks\.1\."):
        Backbone.from_state_dict(state)


# -- preprocessing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size 0"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "above 0"),
        ({"interpolation": "lanczos"}, "bicubic, bilinear, nearest"),
        ({"resize_mode": "crop"}, "shortest, squash, longest"),
    ],
)
def test_unusable_preprocessing_constants_are_refused(settings, message):
    with pytest.raises(BackboneError, match=message):
        Preprocess(**{"size": 64, **settings})


def test_only_square_inputs_are_supported():
    assert Preprocess.from_config({}, (48, 48)).size == 48
    with pytest.raises(BackboneError, match="224 x 336"):
        Preprocess.from_config({}, (224, 336))
    with pytest.raises(BackboneError, match="three numbers"):
        Preprocess.from_config({"mean": "grey"}, 64)


def test_missing_device_is_refused(tiny_state_dict):
    with pytest.raises(BackboneError, match="cannot be used here"):
        Backbone.from_state_dict(tiny_state_dict(**SMALL), device="warp")
