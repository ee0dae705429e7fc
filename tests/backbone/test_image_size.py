"""Other image sizes than that of the weights: equal to open_clip's, recorded, and refused without request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import vlprompt
from vlprompt.backbone import load_backbone
from vlprompt.backbone.architecture import build_model
from vlprompt.errors import BackboneError, HeadError
from vlprompt.io.head import Head, load_head

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
#: Image towers: open_clip's own, with learned and with fixed position embeddings, and towers of timm.
TOWERS: Mapping[str, dict[str, Any]] = {
    "ViT": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "sin-cos": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    | {"pos_embed_type": "sin_cos_2d"},
    "timm-ViT": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "timm-conv": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 8}


def folder_with(vision: Mapping[str, Any], folder: Path, **other: Any) -> str:
    """Write a tiny CLIP with this image tower and return its name; ``other`` replaces values of its configuration."""
    model = {"embed_dim": 16, "vision_cfg": dict(vision), "text_cfg": TEXT}
    network = build_model(model, quick_gelu=False, precision="fp32")
    folder.mkdir()
    tensors = {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    model["vision_cfg"] = {**vision, **other}
    settings = {"model_cfg": {**model, "quick_gelu": False}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"local-dir:{folder}"


@pytest.mark.parametrize("size", [64, 192])
@pytest.mark.parametrize("tower", TOWERS)
def test_another_size_is_open_clips(tower: str, size: int, tmp_path: Path) -> None:
    name = folder_with(TOWERS[tower], tmp_path / "own")
    theirs = open_clip.create_model(name, force_image_size=size).eval().requires_grad_(False)
    ours = load_backbone(name, image_size=size)
    assert ours.preprocess.size == ours.image_size == size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.encode_image(images), theirs.encode_image(images))
    own = load_backbone(name)
    assert (own.fingerprint == ours.fingerprint) == (tower == "timm-conv")  # it has no position embeddings
    with pytest.raises(BackboneError, match=rf"{size} x {size} pixels; .* takes (.|\n)*image_size"):
        own.encode_image(images)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_another_size_in_narrow_precision_is_open_clips(precision: str, tmp_path: Path) -> None:
    name = folder_with(TOWERS["ViT"], tmp_path / "own")
    theirs = open_clip.create_model(name, force_image_size=64, precision=precision)
    ours = load_backbone(name, image_size=64, precision=precision)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.model.state_dict()[key], value), key


def test_the_size_of_the_weights_changes_nothing(tmp_path: Path) -> None:
    demo, same = load_backbone("demo"), load_backbone("demo", image_size=64)
    assert same.fingerprint == demo.fingerprint and same.preprocess == demo.preprocess


def test_another_size_needs_a_request(tmp_path: Path) -> None:
    name = folder_with(TOWERS["ViT"], tmp_path / "own", image_size=64)
    with pytest.raises(BackboneError, match=r"images of 32 pixels, .* takes 64\. .*--backbone\.image_size 64 \(or 32"):
        load_backbone(name)
    assert load_backbone(name, image_size=64).preprocess.size == 64
    assert load_backbone(name, image_size=32).preprocess.size == 32


@pytest.mark.parametrize(
    ("tower", "size", "message"),
    [
        ("ViT", 60, "multiples of 8, such as 56 or 64"),
        ("ViT", 7, "multiples of 8, such as 8"),
        ("timm-ViT", 170, "multiples of 16, such as 160 or 176"),
        ("ViT", 0, "a side of 1 to 4096 pixels"),
        ("ViT", 5000, "a side of 1 to 4096 pixels"),
        ("ViT", True, "a side of 1 to 4096 pixels"),
        ("ViT", "64", "a side of 1 to 4096 pixels"),
        ("ViT", (64, 64), "a side of 1 to 4096 pixels"),
        ("timm-conv", 1, "cannot take images of 1 pixels"),
    ],
)
def test_refused_sizes(tower: str, size: Any, message: str, tmp_path: Path) -> None:
    name = folder_with(TOWERS[tower], tmp_path / "own")
    with pytest.raises(BackboneError, match=message):
        load_backbone(name, image_size=size)


def test_resnets_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"demo-rn is a ResNet, whose attention pool takes 64 pixels only"):
        load_backbone("demo-rn", image_size=96)
    assert load_backbone("demo-rn", image_size=64).preprocess.size == 64
    with pytest.raises(BackboneError, match="96 x 96 pixels; demo-rn takes 64 x 64"):
        load_backbone("demo-rn").encode_image(torch.zeros(1, 3, 96, 96))


def test_weights_from_shapes_take_another_size(
    tiny_state_dict: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    save_file(tiny_state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("from-file", tmp_path / "w.safetensors", image_size=96)
    assert backbone.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, backbone.embed_dim)


def test_a_head_records_the_size(tmp_path: Path) -> None:
    backbone = load_backbone("demo", image_size=96)
    head = Head(vlprompt.create_method("coop", backbone, ["cat", "dog"]))
    folder = head.save_pretrained(tmp_path / "head")
    again, images = load_head(folder), torch.randn(2, 3, 96, 96)
    assert again.backbone.preprocess.size == 96 and torch.equal(again(images), head(images))
    with pytest.raises(HeadError, match=r"image_size: 96 in the head(.|\n)*size: 96 in the head, 64 given(.|\n)*=96\)"):
        load_head(folder, load_backbone("demo"))
    plain = Head(vlprompt.create_method("coop", load_backbone("demo"), ["cat", "dog"]))
    with pytest.raises(HeadError, match="size: 64 in the head, 96 given"):
        load_head(plain.save_pretrained(tmp_path / "plain"), backbone)


def test_a_merged_model_keeps_the_size(tmp_path: Path) -> None:
    head = Head(vlprompt.create_method("clip_lora", load_backbone("demo", image_size=96), ["cat", "dog"]))
    again, images = load_backbone(f"local-dir:{head.save_open_clip(tmp_path / 'own')}"), torch.randn(2, 3, 96, 96)
    assert again.preprocess.size == 96
    torch.testing.assert_close(again.encode_image(images), head.method.image_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "pretrained"), [("local-dir:own", None), ("from-file", "w.safetensors")])
def test_relative_paths_are_recorded_as_absolute_ones(
    name: str,
    pretrained: str | None,
    tiny_state_dict: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder_with(TOWERS["ViT"], tmp_path / "own")
    save_file(tiny_state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    method = vlprompt.create_method("coop", load_backbone(name, pretrained), ["cat", "dog"], context_length=2)
    folder = Head(method).save_pretrained(tmp_path / "head")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    facts = load_head(folder).backbone
    assert str(tmp_path) in (facts.name if pretrained is None else facts.pretrained)
