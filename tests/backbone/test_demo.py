"""The CLIP inside the package: whole, genuine, and honest about the words it never saw."""

from __future__ import annotations

import open_clip
import pytest
import torch

from vlprompt.backbone import load_backbone
from vlprompt.errors import BackboneError


def test_demo_comes_with_the_package():
    backbone = load_backbone("demo")
    assert (backbone.name, backbone.pretrained, backbone.preprocess.size) == ("demo", "demo", 64)
    assert backbone.embed_dim == backbone.text_width == 192 and "QuickGELU" not in repr(backbone)
    assert backbone.logit_scale.item() == pytest.approx(18.5, abs=0.1)
    table = backbone.model.token_embedding.weight
    assert table.shape == (49408, 192) and int((table.abs().sum(1) > 0).sum()) == 4504
    assert load_backbone("demo", None).fingerprint == load_backbone("demo", "demo").fingerprint == backbone.fingerprint


def test_demo_names_the_words_it_never_saw():
    backbone = load_backbone("demo")
    assert backbone.untrained_tokens("a photo of a dog face.") == []
    assert backbone.untrained_tokens("dog_face") == []
    assert backbone.untrained_tokens("a Quokka and a quokka, striped") == ["quokka", "striped"]


def test_demo_is_a_real_clip():
    """Flat discs of a named colour: the demo knows colours that it was told by name only."""
    backbone = load_backbone("demo")
    colours = {"red": (0.87, 0.18, 0.27), "green": (0.47, 0.69, 0.35), "blue": (0.33, 0.67, 0.93)}
    grid = torch.linspace(-1, 1, 64)
    disc = (grid[:, None] ** 2 + grid[None] ** 2 < 0.8).float()
    drawn = torch.stack([1 - disc * (1 - torch.tensor(rgb)[:, None, None]) for rgb in colours.values()])
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.preprocess.mean, backbone.preprocess.std))
    images = torch.nn.functional.normalize(backbone.encode_image((drawn - mean) / std), dim=-1)
    texts = backbone.model.encode_text(open_clip.tokenize([f"a photo of a {name} circle." for name in colours]), True)
    assert (images @ texts.t()).argmax(1).tolist() == [0, 1, 2]


def test_demo_refuses_other_weights():
    for other in ("laion2b_x", "random"):
        with pytest.raises(BackboneError, match="demo brings its own weights"):
            load_backbone("demo", other)
    with pytest.raises(BackboneError, match="use GELU"):
        load_backbone("demo", quick_gelu=True)
