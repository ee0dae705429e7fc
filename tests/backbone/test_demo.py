"""The CLIPs inside the package: complete files, zero-shot ability and untrained words."""

from __future__ import annotations

import open_clip
import pytest
import torch

from vlprompt import create_method
from vlprompt.backbone import VisualTokens, load_backbone
from vlprompt.errors import BackboneError

NAMES = ("demo", "demo-rn")


@pytest.mark.parametrize("name", NAMES)
def test_demos_come_with_the_package(name):
    backbone = load_backbone(name)
    assert (backbone.name, backbone.pretrained, backbone.preprocess.size) == (name, name, 64)
    assert backbone.embed_dim == backbone.text_width == 192 and "QuickGELU" not in repr(backbone)
    assert 10 < backbone.logit_scale.item() < 100
    table = backbone.model.token_embedding.weight
    trained = int((table.abs().sum(1) > 0).sum())
    assert table.shape == (49408, 192) and 5000 < trained < 10_000
    assert load_backbone(name, None).fingerprint == load_backbone(name, name).fingerprint == backbone.fingerprint


def test_demos_share_the_text_tower_and_differ_in_capabilities():
    vit, resnet = (load_backbone(name) for name in NAMES)
    words = open_clip.tokenize(["an emoji of a cat.", "a drawing of a red apple."])
    assert torch.equal(vit.model.encode_text(words), resnet.model.encode_text(words))
    assert vit.fingerprint != resnet.fingerprint
    assert vit.capabilities.image_tokens and not resnet.capabilities.image_tokens
    assert vit.capabilities.token_prompts and resnet.capabilities.token_prompts


def test_the_resnet_refuses_image_tokens():
    resnet = load_backbone("demo-rn")
    tokens = VisualTokens(torch.zeros(2, 192))
    with pytest.raises(BackboneError, match="demo-rn"):
        resnet.encode_image(torch.zeros(1, 3, 64, 64), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_demos_list_untrained_words(name):
    backbone = load_backbone(name)
    assert backbone.untrained_tokens("a photo of a dog face.") == []
    assert backbone.untrained_tokens("dog face") == []
    assert backbone.untrained_tokens("a Quokka and a quokka, isotropic") == ["quokka", "isotropic"]
    with pytest.warns(UserWarning, match="never saw words of 1 of 2 class names.*\n.*'quokka': quokka"):
        create_method("zeroshot", backbone, ["dog face", "quokka"])


@pytest.mark.parametrize("name", NAMES)
def test_demos_classify_colours_by_name(name):
    """Plain discs in three colours are classified by the names of the colours."""
    backbone = load_backbone(name)
    colours = {"red": (0.87, 0.18, 0.27), "green": (0.47, 0.69, 0.35), "blue": (0.33, 0.67, 0.93)}
    grid = torch.linspace(-1, 1, 64)
    disc = (grid[:, None] ** 2 + grid[None] ** 2 < 0.8).float()
    drawn = torch.stack([1 - disc * (1 - torch.tensor(rgb)[:, None, None]) for rgb in colours.values()])
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.preprocess.mean, backbone.preprocess.std))
    images = torch.nn.functional.normalize(backbone.encode_image((drawn - mean) / std), dim=-1)
    texts = backbone.model.encode_text(open_clip.tokenize([f"a photo of a {name} circle." for name in colours]), True)
    assert (images @ texts.t()).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_demos_refuse_other_weights(name):
    for other in ("laion2b_x", "random"):
        with pytest.raises(BackboneError, match=f"{name} includes its weights"):
            load_backbone(name, other)
    with pytest.raises(BackboneError, match="use GELU"):
        load_backbone(name, quick_gelu=True)
