"""``data.transform`` pad and squash, and ``backbone.image_size``, through whole runs: the same pixels everywhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.config.run import BackboneConfig, DataConfig, RunConfig
from vlprompt.data import FewShotData
from vlprompt.data import test_transform as center
from vlprompt.data.transforms import Transform
from vlprompt.datasets import load_dataset
from vlprompt.errors import ConfigError, HeadError
from vlprompt.io.head import load_head
from vlprompt.runs.predict import predict
from vlprompt.runs.run import evaluate_head, run
from vlprompt.runs.session import Session

MODES = {"pad": "longest", "squash": "squash"}


@pytest.fixture(scope="module")
def wide_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 2 classes of wide images, which each transform cuts differently: train/<class>, test/<class>."""
    folder = tmp_path_factory.mktemp("wide")
    demo = load_dataset("demo", shots=1)
    for label in range(2):
        members = [sample for sample in demo.test if sample.label == label]
        for number, sample in enumerate(members[:4]):
            place = folder / ("train" if number < 2 else "test") / demo.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            sample.source.open().resize((120, 60)).save(place / f"{number}.png")
    return folder


def configured(images: Path, output: Path, method: str = "coop", **values: Any) -> RunConfig:
    from tests.fixtures.runs import tiny_run

    return tiny_run(images, output, method, **values)


@pytest.mark.parametrize("kind", MODES)
def test_everything_of_a_run_has_its_transform(kind: str, wide_images: Path, tmp_path: Path) -> None:
    plain = run(configured(wide_images, tmp_path))
    done = run(configured(wide_images, tmp_path, transform=kind))
    assert done.folder != plain.folder
    text = done.results["data"]["transform"]
    assert text["train"] == text["test"] != plain.results["data"]["transform"]["test"]
    recorded = json.loads((done.head_dir / "config.json").read_text())
    assert recorded["preprocess"]["resize_mode"] == MODES[kind]

    head, path = load_head(done.head_dir), next(wide_images.rglob("test/*/*.png"))
    image = Transform(load_head(plain.head_dir).backbone.preprocess, kind)(Image.open(path).convert("RGB"))
    assert torch.equal(image, center(head.backbone.preprocess)(Image.open(path).convert("RGB")))
    expected = head(image[None]).softmax(dim=-1).max()
    assert predict(done.folder, [path])[0]["classes"][0]["probability"] == pytest.approx(float(expected), abs=1e-6)
    for given in ("random", kind):
        scores = evaluate_head(done.folder, DataConfig("folder", str(wide_images), shots=2, transform=given))
        assert scores["correct"] == done.results["results"]["all"]["correct"]
    other = "squash" if kind == "pad" else "pad"
    with pytest.raises(ConfigError, match=rf"data.transform is '{other}'.*resize mode {MODES[kind]}"):
        evaluate_head(done.folder, DataConfig("folder", str(wide_images), shots=2, transform=other))
    with pytest.raises(HeadError, match=r"become square in another way(.|\n)*--data.transform"):
        run(configured(wide_images, tmp_path, init_from=str(done.folder)))
    again = run(configured(wide_images, tmp_path, init_from=str(done.folder), transform=kind))
    assert again.results["data"]["transform"] == text


def test_methods_without_training_have_it_too(wide_images: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(.|\n)*data\.transform")  # it has an effect
        session = Session(configured(wide_images, tmp_path, "zeroshot", transform="pad"))
    assert session.config.data.transform == "pad" and session.backbone.preprocess.resize_mode == "longest"
    after = Session(configured(wide_images, tmp_path, "zeroshot"), after=session)
    assert after.backbone.preprocess.resize_mode == "shortest"


def test_keys_of_features_have_the_transform(wide_images: Path, tmp_path: Path) -> None:
    task = load_dataset("folder", root=wide_images, shots=2)
    backbone = vlprompt.load_backbone("demo")
    keys, rows = [], []
    for kind in ("center", *MODES):
        data = FewShotData(
            task,
            backbone.preprocess,
            transform=kind,
            encode=backbone.encode_image,
            fingerprint=backbone.fingerprint,
            features=tmp_path,
        )
        rows.append({split: data.features(split) for split in ("train", "test")})
        keys.append({split: data.feature_key(split)["view"] for split in rows[-1]})
        transform = Transform(backbone.preprocess, kind)
        for split in rows[-1]:
            images = torch.stack([transform(sample.source.open()) for sample in getattr(task, split)])
            torch.testing.assert_close(rows[-1][split], backbone.encode_image(images), rtol=0, atol=1e-5)
    assert len({key["train"] for key in keys}) == len({key["test"] for key in keys}) == 3


def test_a_method_made_in_python_gets_the_transform(wide_images: Path, tmp_path: Path) -> None:
    task, backbone = load_dataset("folder", root=wide_images, shots=2), vlprompt.load_backbone("demo")
    method = vlprompt.create_method("coop", backbone, task.class_names)
    done = vlprompt.train(method, task, transform="squash", epochs=1, output=str(tmp_path))
    assert method.backbone.preprocess.resize_mode == "squash" and backbone.preprocess.resize_mode == "shortest"
    assert load_head(done.head_dir).backbone.preprocess.resize_mode == "squash"


def test_a_run_with_another_image_size(
    image_folder: Path, tmp_path: Path, folder_of: Callable[[RunConfig], Path]
) -> None:
    import dataclasses

    plain = configured(image_folder, tmp_path)
    config = dataclasses.replace(plain, backbone=BackboneConfig("demo", None, image_size=96))
    done = run(config)
    assert done.folder != folder_of(plain) and done.results["backbone"]["image_size"] == 96
    assert "center crop 96" in done.results["data"]["transform"]["test"]
    path = next(image_folder.rglob("test/*/*.png"))
    assert load_head(done.head_dir).backbone.preprocess.size == 96 and predict(done.folder, [path])
    scores = evaluate_head(done.folder, config.data)
    assert scores["correct"] == done.results["results"]["all"]["correct"]
    with pytest.raises(HeadError, match="size: 96 in the head, 64 given"):
        predict(done.folder, [path], backbone={"image_size": 64})
