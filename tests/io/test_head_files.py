"""The files of a head: atomic replacement and checks of the backbone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vlprompt
from tests.fixtures.audit import touching
from vlprompt.backbone import Backbone
from vlprompt.errors import HeadError
from vlprompt.io import Head, load_head

NAMES = ["grinning face", "red apple", "hot_beverage"]
MIXTURE = {"templates": ["an emoji of a {}.", "a photo of a {}.", "a {} cartoon."], "groups": [1, 1, 1]}


@pytest.fixture(scope="module")
def demo() -> Backbone:
    return vlprompt.load_backbone("demo")


def made(backbone: Backbone, method: str = "coop", seed: int = 1, **settings: Any) -> Head:
    """Return a head with learned tensors that differ from their initialisation."""
    torch.manual_seed(seed)
    given = {"coop": {"context_length": 3}, "mocoop": MIXTURE}.get(method, {}) | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = vlprompt.create_method(method, backbone, NAMES, **given)
    made.load_trained_state({k: v + 0.1 * torch.randn_like(v) for k, v in made.trained_state().items()})
    return Head(made)


def pixels(backbone: Backbone, seed: int = 0) -> torch.Tensor:
    size = backbone.preprocess.size
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(seed))


# -- plain open_clip code ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain_model(demo: Backbone) -> Any:
    """An open_clip CLIP with the demo's weights, created without vlprompt."""
    from open_clip.model import CLIP

    folder = Path(vlprompt.__file__).parent / "assets" / "demo_clip"
    config = json.loads((folder / "demo.json").read_text())["model_cfg"]
    keep = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    model = CLIP(**{key: config[key] for key in keep if key in config})
    model.load_state_dict(demo.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("method", ["zeroshot", "coop"])
@torch.no_grad()
def test_saved_class_weights_are_a_linear_classifier_of_another_model(
    method: str, demo: Backbone, plain_model: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    head = made(demo, method)
    weights = load_file(head.save_pretrained(tmp_path / "head") / "head.safetensors")["class_weights"]
    images = pixels(demo)
    logits = plain_model.logit_scale.exp() * F.normalize(plain_model.encode_image(images), dim=-1) @ weights.T
    expected = head(images)
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_a_mixture_with_tuned_norms_works_in_another_model_per_image(demo: Backbone, plain_model: Any) -> None:
    head = made(demo, "mocoop", tune_layer_norms=True)
    model, images = head.attach(plain_model), pixels(demo)
    features = model.encode_image(images)  # type: ignore[operator]
    assert not torch.allclose(features, plain_model.encode_image(images), rtol=1e-3)
    logits = plain_model.logit_scale.exp() * torch.einsum(
        "bd,bcd->bc", F.normalize(features, dim=-1), head.text_features(features)
    )
    expected = head(images)
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_attach_refuses_other_weights_and_other_models(demo: Backbone, plain_model: Any) -> None:
    import copy

    other = copy.deepcopy(plain_model)
    with torch.no_grad():
        other.visual.conv1.weight.add_(0.5)
    with pytest.raises(HeadError, match=r"with other weights \(1 of .*conv1\.weight"):
        made(demo).attach(other)
    with pytest.raises(HeadError, match="the model is not demo"):
        made(demo).attach(torch.nn.Linear(2, 2))
    with pytest.raises(HeadError, match="clip_adapter changes image features after the tower"):
        made(demo, "clip_adapter").attach(plain_model)


@pytest.mark.parametrize(
    "method", ["clip_lora", "clip_lora text", "clip_lora vision", "ramt", "ramt text", "visual_prompt", "zeroshot"]
)
@torch.no_grad()
def test_a_saved_model_is_the_head_in_both_towers(
    method: str, demo: Backbone, plain_model: Any, tmp_path: Path
) -> None:
    import open_clip

    name, _, side = method.partition(" ")
    key = {"clip_lora": "encoder", "ramt": "side"}.get(name)
    head = made(demo, name, **({key: side} if side and key else {}))
    images = pixels(demo)
    given = head.method.settings
    template = getattr(given, "templates", None) or getattr(given, "template", None) or ("a photo of a {}.",)
    folder = head.save_open_clip(tmp_path / "merged")
    loaded = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    for model in (loaded, head.attach(plain_model)):
        tokens = demo.text.tokenizer([str(template[0]).format(text.replace("_", " ")) for text in NAMES])
        text = F.normalize(model.encode_text(tokens), dim=-1)
        found = F.normalize(model.encode_image(images), dim=-1) @ text.t()
        expected = F.normalize(head.method.image_features(images), dim=-1) @ head.text_features().t()
        assert float((found - expected).abs().max()) <= 1e-5
    again = vlprompt.load_backbone(f"local-dir:{folder}")
    torch.testing.assert_close(again.encode_image(images), loaded.encode_image(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(vlprompt.list_methods()))
def test_no_export_is_half_without_a_word(method: str, demo: Backbone, plain_model: Any, tmp_path: Path) -> None:
    head = made(demo, method)
    refused = contextlib.nullcontext() if head.method.in_towers else pytest.raises(HeadError, match="learns prompts or")
    with refused:
        head.save_open_clip(tmp_path / "merged")
    assert (tmp_path / "merged").exists() == head.method.in_towers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            head.attach(plain_model)
            words = [str(warning.message) for warning in caught]
        except HeadError as error:
            words = [str(error)]
    expected = "its own encode_text is that of the frozen model|cannot"
    assert head.method.in_towers or any(re.search(expected, text) for text in words)


def test_models_are_saved_into_new_folders(demo: Backbone, plain_model: Any, tmp_path: Path) -> None:
    head = made(demo, "clip_lora")
    (tmp_path / "there").mkdir()
    with pytest.raises(HeadError, match="there exists; choose a new folder"):
        head.save_open_clip(tmp_path / "there")
    other = Backbone.from_open_clip(plain_model, name="mine")
    with pytest.raises(HeadError, match="made from a model in memory, whose architecture is not recorded"):
        made(other, "clip_lora").save_open_clip(tmp_path / "new")


# -- atomic replacement -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["os.replace", "os.rename", "os.chmod", "json.dumps"])
def test_a_save_that_fails_at_any_step_keeps_the_older_head(
    step: str, demo: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = made(demo)
    folder = older.save_pretrained(tmp_path / "head")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    newer = made(demo, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(f"vlprompt.io.head.{step}", fail)
        with pytest.raises(
            HeadError, match=r"cannot be saved in .*head: Permission denied; what was there is unchanged"
        ):
            newer.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_interrupted_first_save_is_not_a_head(
    failing: int, demo: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, replace = [], os.replace

    def interrupt(*args: Any) -> None:
        calls.append(args)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(*args)

    head = made(demo)
    with monkeypatch.context() as patch:
        patch.setattr("vlprompt.io.head.os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            head.save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match="there is no folder|holds no head"):
        load_head(tmp_path / "head", demo)
    head.save_pretrained(tmp_path / "head")
    assert load_head(tmp_path / "head", demo).class_names == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_save_killed_between_its_two_renames_names_the_older_head(
    demo: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(demo).save_pretrained(tmp_path / "head")
    folder.rename(tmp_path / ".head.older-abc")
    with pytest.raises(HeadError, match=r"interrupted; restore the older head: mv .*\.head\.older-abc .*head$"):
        load_head(folder, demo)


def test_folders_with_unusual_names(demo: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, images = made(demo), pixels(demo)
    expected = head(images)
    for name in ("with blanks [and] *brackets*", "ü🦊", "-rf", "n" * 240, "a/b/c"):
        folder = head.save_pretrained(tmp_path / "names" / name)
        assert torch.equal(load_head(folder, demo)(images), expected)
        head.save_pretrained(tmp_path / "names" / name)  # replaces itself
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    head.save_pretrained(".")
    assert sorted(os.listdir()) == ["config.json", "head.safetensors"]
    assert torch.equal(load_head(".", demo)(images), expected)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    made(demo, seed=3).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not torch.equal(load_head(tmp_path / "here", demo)(images), expected)


def test_invalid_folders_are_refused(demo: Backbone, tmp_path: Path) -> None:
    head = made(demo)
    (tmp_path / "file").write_text("precious")
    for name, message in (("file", "is a file"), ("file/below", "cannot be saved"), ("n" * 300, "cannot be saved")):
        with pytest.raises(HeadError, match=message):
            head.save_pretrained(tmp_path / name)
    for name, message in (("file", "is a file"), ("none", "there is no folder"), ("n" * 5000, "there is no folder")):
        with pytest.raises(HeadError, match=message):
            load_head(tmp_path / name, demo)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "precious"


# -- the backbone -----------------------------------------------------------------------------------------------------
def saved(kind: str, state: dict[str, torch.Tensor], folder: Path) -> tuple[str, str]:
    """Save a small CLIP and return its ``name`` and ``pretrained`` for ``load_backbone``."""
    if kind == "from-file":
        from safetensors.torch import save_file

        save_file(state, folder / "tiny.safetensors")
        return "from-file", str(folder / "tiny.safetensors")
    from safetensors.torch import save_model

    backbone = Backbone.from_state_dict(state)
    path = folder / "own"
    path.mkdir()
    save_model(backbone.model, str(path / "open_clip_model.safetensors"))
    visual, text = backbone.model.visual, backbone.model.transformer
    vision = {
        "image_size": int(backbone.preprocess.size),
        "layers": len(visual.transformer.resblocks),
        "width": visual.conv1.weight.shape[0],
        "patch_size": visual.conv1.weight.shape[-1],
        "head_width": visual.conv1.weight.shape[0] // visual.transformer.resblocks[0].attn.num_heads,
    }
    texts = {
        "context_length": 77,
        "vocab_size": backbone.model.vocab_size,
        "width": backbone.text_width,
        "heads": text.resblocks[0].attn.num_heads,
        "layers": len(text.resblocks),
    }
    model = {"embed_dim": backbone.embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": texts}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return f"local-dir:{path}", "openai"


@pytest.mark.parametrize("kind", ["from-file", "local-dir"])
def test_a_head_on_local_weights_loads_them_again(
    kind: str, tiny_state_dict: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    name, pretrained = saved(kind, tiny_state_dict(), tmp_path)
    backbone = vlprompt.load_backbone(name, pretrained)
    head, images = made(backbone), pixels(backbone)
    folder = head.save_pretrained(tmp_path / "head")
    assert torch.equal(load_head(folder)(images), head(images))
    if kind == "local-dir":
        shutil.rmtree(tmp_path / "own")
    else:
        (tmp_path / "tiny.safetensors").unlink()
    with pytest.raises(HeadError, match=r"cannot be loaded by its name(.|\n)*pass it: load_head\(folder, backbone\)"):
        load_head(folder)
    assert torch.equal(load_head(folder, backbone)(images), head(images))


def test_other_weights_of_the_same_shape_are_refused(
    tiny_backbone: Backbone, tiny_state_dict: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = made(tiny_backbone).save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match="another backbone:\n  fingerprint: ") as caught:
        load_head(folder, Backbone.from_state_dict(tiny_state_dict(seed=1), name="tiny"))
    assert tiny_backbone.fingerprint in str(caught.value)


def test_another_precision_is_refused(demo: Backbone, tmp_path: Path) -> None:
    folder = made(demo).save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match="precision: 'fp32' in the head, 'bf16' given"):
        load_head(folder, vlprompt.load_backbone("demo", precision="bf16"))


def test_a_head_in_bfloat16_loads_its_backbone(tmp_path: Path) -> None:
    backbone = vlprompt.load_backbone("demo", precision="bf16")
    head, images = made(backbone), pixels(backbone)
    folder = head.save_pretrained(tmp_path / "head")
    again = load_head(folder)
    assert again.backbone.precision == "bf16" and torch.equal(again(images), head(images))


def test_other_image_constants_are_refused(
    tiny_backbone: Backbone, tiny_state_dict: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    import dataclasses

    folder = made(tiny_backbone).save_pretrained(tmp_path / "head")
    other = Backbone.from_state_dict(tiny_state_dict(), name="tiny")
    other.preprocess = dataclasses.replace(other.preprocess, mean=(0.5, 0.5, 0.5))
    with pytest.raises(HeadError, match=r"preprocess\.mean: \[0\.48.*\] in the head, \[0\.5, 0\.5, 0\.5\] given"):
        load_head(folder, other)


def test_loading_does_not_change_the_random_state(demo: Backbone, tmp_path: Path) -> None:
    folder = made(demo).save_pretrained(tmp_path / "head")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_head(folder, demo)
    assert torch.equal(torch.rand(3), expected)


def test_saving_the_same_head_twice_gives_the_same_bytes(demo: Backbone, tmp_path: Path) -> None:
    first, second = made(demo).save_pretrained(tmp_path / "a"), made(demo).save_pretrained(tmp_path / "b")
    for name in ("config.json", "head.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


# -- untrusted heads --------------------------------------------------------------------------------------------------
def _leaves(value: Any, steps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The steps to every text of a JSON value; of a list only the first item."""
    if isinstance(value, str):
        yield steps
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for step, inner in items:
        yield from _leaves(inner, (*steps, step))


def test_no_text_of_a_head_reads_a_file_elsewhere(demo: Backbone, tmp_path: Path) -> None:
    made(demo, "mocoop").save_pretrained(tmp_path / "head")
    path, secret = tmp_path / "head" / "config.json", tmp_path / "secret.json"
    secret.write_text(json.dumps({name: ["a secret {}."] for name in NAMES}))
    config = json.loads(path.read_text())
    steps_of = list(_leaves(config))
    assert ("settings", "templates", 0) in steps_of
    for *steps, last in steps_of:
        for text in (f"file:{secret}", f"descriptors:{secret}", str(secret), "../secret.json", f"local-dir:{tmp_path}"):
            changed = json.loads(json.dumps(config))
            place = changed
            for step in steps:
                place = place[step]
            place[last] = text
            path.write_text(json.dumps(changed))
            with touching(tmp_path / "head") as outside, contextlib.suppress(HeadError):
                load_head(tmp_path / "head", demo)
            assert outside == [], (steps, last, text)


def test_a_head_whose_configuration_repeats_a_key_or_names_a_file_is_refused(demo: Backbone, tmp_path: Path) -> None:
    made(demo).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    for changed, match in (
        (text.replace('"schema": 1', '"schema": 1, "schema": 1'), "'schema' is given twice"),
        (
            text.replace('"objectives": {}', '"objectives": {"x": {"y": ["file:/etc/passwd"]}}'),
            "names a file, 'file:/etc",
        ),
    ):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(HeadError, match=match):
            load_head(tmp_path, demo)


def test_modes_of_a_head_follow_the_umask(demo: Backbone, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        made(demo).save_pretrained(tmp_path / "head")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "head").iterdir()}
    assert modes == {"config.json": 0o640, "head.safetensors": 0o640}
    assert stat.S_IMODE((tmp_path / "head").stat().st_mode) == 0o750
