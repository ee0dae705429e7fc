"""load_backbone: all accepted names and weights, and all refusals with their remedies."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file

from vlprompt.backbone import Backbone, list_backbones, load_backbone
from vlprompt.errors import BackboneError

DIMS = {"text_width": 64, "vision_width": 64, "text_layers": 1, "vision_layers": 1}
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
OPENAI = {"hf_hub": "acme/tiny.openai/", "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}
LAION = {"hf_hub": "acme/tiny.laion/", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    """Register small architectures in open_clip and use empty caches."""
    configs = {
        "Tiny-16": CONFIG,
        "Tiny-16-quickgelu": {**CONFIG, "quick_gelu": True},
        "Tiny-8": {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 8}},
        "Tiny-hf": {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}},
        "Tiny-siglip": {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "pool_type": "last"}},
        "Tiny-mixed": CONFIG,
    }
    for name, config in configs.items():
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    tags = {"openai": OPENAI, "laion2b_x": LAION}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-16", tags)
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-16-quickgelu", {"openai": OPENAI})
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-hf", tags)
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-mixed", {"a": LAION, "b": {**LAION, "mean": (0.5, 0.5, 0.5)}})
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_state_dict):
    """A file with weights of the small architecture that does not state the activation."""
    path = tmp_path_factory.mktemp("weights") / "open_clip_model.safetensors"
    save_file(tiny_state_dict(**DIMS), path)
    return path


@pytest.fixture
def cached(tmp_path, weights):
    """Put the weights into the cache under both tags."""
    for tag in ("openai", "laion2b_x"):
        folder = tmp_path / "cache" / "weights" / "Tiny-16" / tag
        folder.mkdir(parents=True)
        (folder / weights.name).symlink_to(weights)


def refusal(*args, **kwargs):
    with pytest.raises(BackboneError) as caught:
        load_backbone(*args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) <= 20 and "Traceback" not in text
    return text


def quick(backbone):
    return {type(block.mlp.gelu).__name__ for block in backbone.model.transformer.resblocks} == {"QuickGELU"}


# -- tags --------------------------------------------------------------------------------------------------------------
def test_tag_determines_weights_activation_and_constants(cached, tiny_state_dict):
    backbone = load_backbone("Tiny-16", "openai")
    assert (backbone.name, backbone.pretrained) == ("Tiny-16", "openai") and quick(backbone)
    assert backbone.preprocess.mean == (0.4, 0.5, 0.6) and backbone.preprocess.size == 64
    assert backbone.fingerprint == Backbone.from_state_dict(tiny_state_dict(**DIMS)).fingerprint
    assert not quick(load_backbone("Tiny-16", "laion2b_x"))


def test_spelling_of_openais_package_is_accepted(cached):
    backbone = load_backbone("Tiny/16", "LAION2B-x")
    assert (backbone.name, backbone.pretrained) == ("Tiny-16", "laion2b_x")


def test_openai_weights_never_run_without_quickgelu(cached):
    assert quick(load_backbone("Tiny-16", "openai", quick_gelu=True))
    text = refusal("Tiny-16", "openai", quick_gelu=False)
    assert "QuickGELU" in text and "Omit quick_gelu" in text
    assert "use GELU" in refusal("Tiny-16", "laion2b_x", quick_gelu=True)


def test_tag_with_a_given_file(weights):
    backbone = load_backbone("Tiny-16", f"openai={weights}")
    assert quick(backbone) and backbone.pretrained == "openai" and backbone.preprocess.mean == (0.4, 0.5, 0.6)


def test_missing_weights_name_file_address_and_target(tmp_path):
    text = refusal("Tiny-16", "openai")
    assert "HF_HUB_OFFLINE" in text and "acme/tiny.openai/resolve/main/open_clip_model.safetensors" in text
    assert str(tmp_path / "cache") in text


def test_every_published_tag_of_the_real_registry_has_a_source_or_an_address():
    from vlprompt.backbone.fetch import published

    for name, tag in (pair.split("/") for pair in list_backbones() if "/" in pair):
        source = published(name, tag, pretrained.get_pretrained_cfg(name, tag))
        assert (source.repo or source.url) and all(source.files)


# -- refusals of names and tags ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ViT-B-61", "'ViT-B-16'"),
        ("vit_b_16", "'ViT-B-16'"),
        ("Demo", "'demo'"),
        ("RN5O", "'RN50'"),
        ("formfile", "'from-file'"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, near):
    text = refusal(name)
    assert f"no backbone {name!r}" in text and near in text


def test_unknown_tags_list_the_accepted_ones():
    text = refusal("Tiny-16", "opnai")
    assert "'opnai'" in text and "Did you mean 'openai'" in text and "laion2b_x" in text and "random" in text
    assert "no published tags" in refusal("Tiny-8", "openai")
    assert "'nope'" in refusal("Tiny-16", "nope=somewhere.pt")


@pytest.mark.parametrize("pretrained", [None, ""])
def test_random_weights_must_be_requested(pretrained):
    text = refusal("Tiny-16", pretrained)
    assert "random" in text and "openai" in text


def test_random_weights_are_reproducible():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_backbone("Tiny-16", "random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = load_backbone("Tiny-16", "random")
    assert first.fingerprint == second.fingerprint and first.pretrained == "random"
    assert load_backbone("Tiny-16", "random", quick_gelu=True).fingerprint != first.fingerprint
    assert quick(load_backbone("Tiny-16-quickgelu", "random"))
    assert "networks called Tiny-16-quickgelu" in refusal("Tiny-16-quickgelu", "random", quick_gelu=False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Tiny-hf", "Hugging Face model 'roberta-base'"),
        ("Tiny-siglip", "pools 'last'"),
        ("ViT-B-16-SigLIP", "not CLIP's byte pairs"),
        ("coca_ViT-B-32", "CoCa"),
        ("xlm-roberta-base-ViT-B-32", "Hugging Face model"),
    ],
)
def test_unsupported_text_towers_are_refused_before_any_download(name, reason):
    text = refusal(name, "openai")
    assert reason in text and name in text and "ViT-B-16" in text


@pytest.mark.parametrize(("key", "value"), [("precision", "int8"), ("precision", "FP32"), ("device", "warp")])
def test_other_arguments_are_checked(key, value):
    assert repr(value) in refusal("demo", **{key: value})


# -- bare files --------------------------------------------------------------------------------------------------------
def test_bare_file_needs_its_activation(weights):
    text = refusal("Tiny-16", weights)
    assert f"--backbone.pretrained openai={weights}" in text and "open_clip_config.json" in text
    assert quick(load_backbone("Tiny-16", weights, quick_gelu=True))
    assert not quick(load_backbone("Tiny-16", weights, quick_gelu=False))
    backbone = load_backbone("Tiny-16-quickgelu", str(weights))
    assert quick(backbone) and backbone.pretrained == str(weights)
    assert backbone.preprocess.mean == (0.4, 0.5, 0.6)  # the same for all published weights of the name
    assert "is contradictory" in refusal("Tiny-16-quickgelu", weights, quick_gelu=False)


def test_bare_file_needs_its_constants_if_published_weights_differ(weights):
    assert "their image constants" in refusal("Tiny-mixed", weights, quick_gelu=False)


def test_openai_archive_fields_determine_the_activation(tmp_path, tiny_state_dict):
    path = tmp_path / "archive.pt"
    torch.save(tiny_state_dict(archive_fields=True, **DIMS), path)
    assert quick(load_backbone("Tiny-16", path)) and quick(load_backbone("from-file", path))
    assert "is contradictory" in refusal("Tiny-16", path, quick_gelu=False)
    assert "OpenAI release" in refusal("Tiny-16", f"laion2b_x={path}")
    assert "OpenAI release" in refusal("from-file", path, quick_gelu=False)


def test_configuration_in_the_folder_of_a_file_is_read(tmp_path, weights):
    path = tmp_path / "own.safetensors"
    path.symlink_to(weights)
    settings = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    backbone = load_backbone("Tiny-16", path)
    assert quick(backbone) and backbone.preprocess.mean == (0.1, 0.2, 0.3)


def test_file_of_another_architecture_is_refused_with_its_name(weights):
    text = refusal("Tiny-8", weights, quick_gelu=True)
    assert (
        "does not fit Tiny-8" in text and "visual.conv1.weight: shape [64, 3, 16, 16], expected [64, 3, 8, 8]" in text
    )
    assert "--backbone.name Tiny-16" in text


def test_truncated_state_dict_is_refused_by_name(tmp_path, tiny_state_dict):
    state = tiny_state_dict(**DIMS)
    del state["transformer.resblocks.0.mlp.c_fc.bias"]
    save_file(state, tmp_path / "w.safetensors")
    text = refusal("Tiny-16", f"openai={tmp_path}/w.safetensors")
    assert "1 tensors missing" in text and "missing: transformer.resblocks.0.mlp.c_fc.bias" in text


def test_missing_paths_are_named(tmp_path):
    assert "no weight file" in refusal("Tiny-16", tmp_path / "none.pt")
    assert "no weight file none.safetensors" in refusal("Tiny-16", "none.safetensors")
    assert f"local-dir:{tmp_path}" in refusal("Tiny-16", tmp_path)
    assert "no weight file" in refusal("Tiny-16", "openai=/nowhere/w.pt")


def test_from_file_reads_the_architecture_from_the_shapes(tmp_path, tiny_state_dict, weights):
    torch.save(tiny_state_dict(embed_dim=32, image_size=48, **DIMS), tmp_path / "w.pt")
    backbone = load_backbone("from-file", tmp_path / "w.pt")
    assert (backbone.embed_dim, backbone.preprocess.size, quick(backbone)) == (32, 48, True)
    assert not quick(load_backbone("from-file", weights, quick_gelu=False))
    assert "needs a file" in refusal("from-file") and "needs a file" in refusal("from-file", None)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    assert "not an OpenAI-format CLIP" in refusal("from-file", tmp_path / "other.pt")


# -- folders -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, weights):
    path = tmp_path / "own"
    path.mkdir()
    (path / "open_clip_model.safetensors").symlink_to(weights)
    constants = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    settings = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": constants}
    (path / "open_clip_config.json").write_text(json.dumps(settings))
    return path


def test_folder_equals_open_clips_loader(folder):
    backbone = load_backbone(f"local-dir:{folder}")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval().requires_grad_(False)  # frozen like ours: requires_grad affects the choice of CPU kernels
    x, tokens = torch.randn(2, 3, 64, 64), open_clip.tokenize(["a photo of a cat.", "dogs"])
    assert torch.equal(backbone.encode_image(x), theirs.encode_image(x))
    assert torch.equal(backbone.model.encode_text(tokens), theirs.encode_text(tokens))
    preprocess = backbone.preprocess
    assert (preprocess.size, preprocess.mean, preprocess.std) == (64, (0.5,) * 3, (0.25,) * 3)
    assert (preprocess.interpolation, preprocess.resize_mode) == ("bilinear", "squash")


def test_custom_text_folder_accepts_plain_parameter_names(folder):
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["custom_text"] = True
    plain = load_backbone(f"local-dir:{folder}")
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    custom = load_backbone(f"local-dir:{folder}")
    tokens = open_clip.tokenize(["a photo of a cat."])
    assert hasattr(custom.model, "text")
    assert torch.equal(custom.model.encode_text(tokens), plain.model.encode_text(tokens))


def test_folder_refuses_other_weights_and_another_activation(folder):
    assert "includes its weights" in refusal(f"local-dir:{folder}", "laion2b_x")
    assert "use QuickGELU" in refusal(f"local-dir:{folder}", quick_gelu=False)
    assert load_backbone(f"local-dir:{folder}", "random").pretrained == "random"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "cannot be read as JSON"),
        ("[]", "lacks model_cfg"),
        ('{"model_cfg": {"embed_dim": 3}}', "lacks model_cfg"),
        (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": [1]}), "not a table"),
        (json.dumps({"model_cfg": {**CONFIG, "colour": 3}}), "cannot build this architecture"),
        (json.dumps({"model_cfg": {**CONFIG, "embed_dim": "wide"}}), "cannot build this architecture"),
        (json.dumps({"model_cfg": {**CONFIG, "vision_cfg": {"layers": 1, "width": 65}}}), "does not fit"),
        (json.dumps({"model_cfg": {**CONFIG, "embed_dim": 32}}), "visual.proj: shape [64, 64], expected [64, 32]"),
        (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [1, 2]}}), "three numbers"),
        (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"interpolation": 3}}), "bicubic, bilinear, nearest"),
        (json.dumps({"model_cfg": {**CONFIG, "multimodal_cfg": {}}}), "CoCa"),
    ],
)
def test_wrong_folder_configurations_are_refused(folder, content, message):
    (folder / "open_clip_config.json").write_text(content)
    assert message in refusal(f"local-dir:{folder}")


def test_incomplete_folders_are_refused(folder, weights, tmp_path):
    assert "no folder" in refusal(f"local-dir:{tmp_path}/none") and "no folder" in refusal("local-dir:")
    (folder / "open_clip_model.safetensors").unlink()
    assert "holds no weights" in refusal(f"local-dir:{folder}")
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).symlink_to(weights)
    assert "a.safetensors, b.safetensors" in refusal(f"local-dir:{folder}")
    (folder / "b.safetensors").unlink()
    assert load_backbone(f"local-dir:{folder}").pretrained == "a.safetensors"
    (folder / "open_clip_config.json").unlink()
    assert "has no open_clip_config.json" in refusal(f"local-dir:{folder}")


def test_missing_hub_repository_names_the_files_to_fetch():
    text = refusal("hf-hub:acme/none")
    assert "hf-hub:acme/none" in text and "open_clip_config.json" in text and "local-dir:FOLDER" in text


# -- the list, silence and imports ------------------------------------------------------------------------------------
def test_list_holds_exactly_the_supported_backbones():
    names = list_backbones()
    assert names[0] == "demo" and {"ViT-B-16/openai", "ViT-B-16/laion2b_s34b_b88k", "RN50/openai"} <= set(names)
    assert not [name for name in names if "SigLIP" in name or "coca" in name or "roberta" in name]
    assert list_backbones("vit-b-16/OPENAI") == ["ViT-B-16/openai"] and list_backbones("d*") == ["demo", "demo-rn"]
    assert list_backbones("nothing-like-it") == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_backbones_load_in_every_precision(weights, precision):
    assert load_backbone("from-file", weights, precision=precision).precision == precision
    assert load_backbone("demo", precision=precision).encode_image(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


def test_loading_is_quiet(cached, caplog, capsys):
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        load_backbone("Tiny-16", "openai")
    assert caplog.records == [] and capsys.readouterr() == ("", "") and logging.getLogger().handlers == handlers


def test_importing_the_package_does_not_import_open_clip_or_torch():
    code = "import sys, vlprompt.backbone as b; assert 'open_clip' not in sys.modules and 'torch' not in sys.modules; "
    code += "assert 'load_backbone' in dir(b)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    import vlprompt.backbone

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlprompt.backbone.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        *(
            ("vision_cfg", {"timm_model_name": name}, "timm_model_name is .*; accepted: the name of a timm model")
            for name in ("hf_hub:evil/x", "hf-hub:evil/x", "local-dir:/elsewhere", "../x", "/etc", "a\x1b[2J", 7, ["a"])
        ),
        *(
            ("text_cfg", {"tokenizer_kwargs": value}, "tokenizer_kwargs is ")
            for value in (
                {"bpe_path": "/etc/passwd"},
                {"clean": ["lower"]},
                {"additional_special_tokens": "x"},
                [1],
                "x",
            )
        ),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "wash"}}, "does not accept .*wash"),
        ("text_cfg", {"layers": 10**9}, "text_cfg.layers is 1000000000; accepted: numbers up to 1,000"),
        ("vision_cfg", {"layers": [1, 2, 10**9, 1]}, "vision_cfg.layers"),
        ("text_cfg", {"vocab_size": 10**12}, "text_cfg.vocab_size"),
        ("vision_cfg", {"width": float("inf")}, "vision_cfg.width"),
        ("", {"embed_dim": 10**7}, "embed_dim"),
        *(("", {"quick_gelu": value}, "quick_gelu is .*; accepted: true or false") for value in (2, {"a": 1}, "no")),
        ("", {"embed_dim": float("nan")}, "embed_dim"),
    ],
)
def test_a_configuration_names_no_other_places_and_no_impossible_sizes(section, change, match, tmp_path):
    config = copy.deepcopy(CONFIG)
    (config[section] if section else config).update(change)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(BackboneError, match=match):
        load_backbone(f"local-dir:{tmp_path}", "random")
