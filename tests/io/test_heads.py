"""Heads: identical logits in a new process, use in plain open_clip code, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vlprompt
from vlprompt.errors import ClassNameError, HeadError
from vlprompt.io import Head, load_head

NAMES = ["grinning face", "red apple", "hot_beverage"]
SETTINGS: dict[str, dict[str, Any]] = {
    "zeroshot": {},
    "coop": {"context_length": 4},
    "mocoop": {"templates": ["an emoji of a {}.", "a photo of a {}.", "a {} cartoon."], "groups": [1, 1, 1]},
}


@pytest.fixture(scope="module")
def demo() -> vlprompt.Backbone:
    return vlprompt.load_backbone("demo")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(name: str, backbone: vlprompt.Backbone, **settings: Any) -> Head:
    """Return a head with learned tensors that differ from their initialisation."""
    torch.manual_seed(3)
    method = vlprompt.create_method(name, backbone, NAMES, **{**SETTINGS.get(name, {}), **settings})
    state = {key: value + 0.05 * torch.randn_like(value) for key, value in method.trained_state().items()}
    method.load_trained_state(state)
    return Head(method, {"epochs": 1})


NEW_PROCESS = """
import sys
from pathlib import Path

import torch
import vlprompt

torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = torch.load(folder / "images.pt", weights_only=True)
for head in sorted(folder.glob("*/head")):
    torch.save(vlprompt.load_head(head)(images), head.with_name("logits.pt"))
"""


@pytest.fixture(scope="module")
def saved(
    demo: vlprompt.Backbone, images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Head, torch.Tensor]]:
    """A head of every method with its logits in a new process, which loads all heads."""
    folder = tmp_path_factory.mktemp("heads")
    torch.save(images, folder / "images.pt")
    heads = {name: trained(name, demo) for name in vlprompt.list_methods()}
    for name, head in heads.items():
        head.save_pretrained(folder / name / "head")
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(folder)], check=True, cwd=Path(__file__).parents[2])
    return {name: (head, torch.load(folder / name / "logits.pt", weights_only=True)) for name, head in heads.items()}


@pytest.mark.parametrize("name", vlprompt.list_methods())
def test_a_new_process_gives_identical_logits(
    name: str, saved: dict[str, tuple[Head, torch.Tensor]], images: torch.Tensor
) -> None:
    head, logits = saved[name]
    assert torch.equal(logits, head(images))


@pytest.mark.parametrize("name", ["zeroshot", "coop"])
def test_text_features_work_in_plain_open_clip_code(name: str, demo: vlprompt.Backbone, images: torch.Tensor) -> None:
    head, model = trained(name, demo), demo.model
    weights = head.text_features()
    assert weights.shape == (3, 192)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(3))
    with torch.no_grad():
        plain = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ weights.T
    torch.testing.assert_close(plain, head(images), rtol=1e-5, atol=1e-4)
    assert torch.equal(plain.argmax(-1), head(images).argmax(-1))


@pytest.mark.parametrize("tune", [False, True])
def test_a_mixture_works_in_plain_open_clip_code_per_image(
    tune: bool, demo: vlprompt.Backbone, images: torch.Tensor
) -> None:
    head = trained("mocoop", demo, tune_layer_norms=tune)
    before = {name: value.clone() for name, value in demo.model.visual.state_dict().items()}
    model = head.attach(demo.model)
    with torch.no_grad():
        features = model.encode_image(images)
        weights = head.text_features(features)
        plain = model.logit_scale.exp() * torch.einsum("bd,bcd->bc", F.normalize(features, dim=-1), weights)
    assert weights.shape == (6, 3, 192)
    torch.testing.assert_close(plain, head(images), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in demo.model.visual.state_dict().items())


def test_one_classifier_of_a_mixture_warns(demo: vlprompt.Backbone) -> None:
    with pytest.warns(UserWarning, match=r"text_features\(features\)"):
        weights = trained("mocoop", demo).text_features()
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("name", [name for name in vlprompt.list_methods() if name != "tda"])
def test_other_classes_keep_the_logits_of_shared_ones(name: str, demo: vlprompt.Backbone, images: torch.Tensor) -> None:
    head = trained(name, demo)
    other = head.with_classes([NAMES[2], "blue heart", NAMES[0]])
    torch.testing.assert_close(other(images)[:, [2, 0]], head(images)[:, [0, 2]], rtol=1e-5, atol=1e-4)


def test_class_specific_context_refuses_other_classes(demo: vlprompt.Backbone) -> None:
    with pytest.raises(ClassNameError, match="class_specific"):
        trained("coop", demo, class_specific=True).with_classes(["blue heart"])


def test_the_folder_holds_only_tensors_and_plain_values(demo: vlprompt.Backbone, tmp_path: Path) -> None:
    folder = trained("coop", demo).save_pretrained(tmp_path / "head")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "head.safetensors"]
    assert sorted(load_file(folder / "head.safetensors")) == ["class_weights", "learnable.prompt.ctx"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"], config["class_names"]) == ("coop", NAMES)
    assert config["backbone"]["fingerprint"] == demo.fingerprint
    assert config["preprocess"]["size"] == 64 and config["training"] == {"epochs": 1}


def test_an_older_head_is_replaced_and_survives_a_failed_save(
    demo: vlprompt.Backbone, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = trained("coop", demo)
    folder = old.save_pretrained(tmp_path / "head")
    monkeypatch.setattr("vlprompt.io.head.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(HeadError, match="disk full; what was there is unchanged"):
        trained("zeroshot", demo).save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(load_head(folder, demo)(images), old(images))
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    trained("zeroshot", demo).save_pretrained(folder)
    assert load_head(folder, demo).method.name == "zeroshot"


def test_a_folder_with_other_files_is_not_changed(demo: vlprompt.Backbone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(HeadError, match=r"thesis\.tex"):
        trained("zeroshot", demo).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_backbone_is_refused(demo: vlprompt.Backbone, tiny_backbone: vlprompt.Backbone, tmp_path: Path) -> None:
    folder = trained("coop", demo).save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match=r"another backbone:\n(.|\n)*embed_dim: 192 in the head, 64 given"):
        load_head(folder, tiny_backbone)


def test_a_head_on_weights_without_a_file_needs_its_backbone(tiny_backbone: vlprompt.Backbone, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = trained("coop", tiny_backbone).save_pretrained(tmp_path / "head")
    assert load_head(folder, tiny_backbone).class_names == NAMES
    with pytest.raises(HeadError, match=r"load_head\(.*, backbone\)"):
        load_head(folder)
