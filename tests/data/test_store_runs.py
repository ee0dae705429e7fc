"""Complete runs and the feature store: encoded and skipped images; stored views train like fresh views."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.config.run import BackboneConfig, DataConfig, RecipeConfig, RunConfig, TrainerConfig
from vlprompt.errors import ConfigError, DataError
from vlprompt.runs.run import run

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def image_folder(tmp_path: Path, paint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    for label, name in enumerate(CLASSES):
        for split, count in (("train", 4), ("test", 3)):
            for number in range(count):
                paint(tmp_path / "images" / split / name / f"{number}.png", 40 * label + number, size=(30, 40))
    return tmp_path / "images"


def config(image_folder: Path, output: str, method: str = "coop", **data: Any) -> RunConfig:
    return RunConfig(
        method,
        {"context_init": "an emoji of a"} if method == "coop" else {},
        BackboneConfig("demo", None),
        DataConfig("folder", str(image_folder), 4, **data),
        RecipeConfig(epochs=3, batch_size=4, lr=0.1),
        TrainerConfig(accelerator="cpu", progress=False),
        output=str(image_folder.parent / output),
    )


@pytest.mark.parametrize(
    ("method", "data", "encoded"),
    [("zeroshot", {}, 9), ("coop", {"transform": "center"}, 21), ("coop", {}, 45), ("coop", {"cached_views": 2}, 33)],
)
def test_the_second_run_encodes_nothing(method: str, data: dict[str, Any], encoded: int, image_folder: Path) -> None:
    first, second = (run(config(image_folder, output, method, **data)) for output in ("one", "two"))
    assert first.results["images"]["encoded"] == encoded  # 9 to test, 12 to train in each view
    assert second.results["images"] == {"encoded": 0, "skipped": {"train": 0, "val": 0, "test": 0, "ids": []}}
    assert json.loads((second.folder / "results.json").read_text())["images"]["encoded"] == 0
    assert first.results["results"] == second.results["results"]
    assert torch.equal(first.head().text_features(), second.head().text_features())


def test_stored_views_train_like_fresh_views(image_folder: Path) -> None:
    stored, fresh = (run(config(image_folder, "runs", cached_views=views)) for views in (None, 0))
    assert (stored.results["images"]["encoded"], fresh.results["images"]["encoded"]) == (45, 0)
    expected = fresh.head().text_features()
    torch.testing.assert_close(stored.head().text_features(), expected, rtol=1e-5, atol=1e-6)
    assert stored.results["results"] == fresh.results["results"]
    few = run(config(image_folder, "runs", cached_views=1)).head().text_features()
    assert not torch.allclose(few, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", [{}, {"cached_views": 0}, {"transform": "center"}])
def test_a_run_reports_skipped_images(data: dict[str, Any], image_folder: Path) -> None:
    bad = [image_folder / "train" / "cat" / "1.png", image_folder / "test" / "owl" / "2.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(DataError, match="(cat/1|owl/2).png cannot be decoded"):
        run(config(image_folder, "runs", **data))
    with pytest.warns(UserWarning, match="skipped: 2"):
        done = run(config(image_folder, "runs", on_bad_image="skip", **data))
    skipped = done.results["images"]["skipped"]
    assert (skipped["train"], skipped["test"]) == (1, 1)
    assert [Path(name).name for name in skipped["ids"]] == ["1.png", "2.png"]
    assert done.results["results"]["all"]["total"] == done.results["zeroshot"]["all"]["total"] == 8
    with pytest.raises(DataError, match="(cat/1|owl/2).png cannot be decoded"):
        run(config(image_folder, "runs", **data))


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(workers=-1, cached_views=-2)
    problems = str(caught.value).splitlines()
    assert [text.split(";")[0] for text in problems] == ["data.workers is -1", "data.cached_views is -2"]
    assert DataConfig(workers=None, cached_views=None) == DataConfig()
    with pytest.raises(ConfigError, match="no random views"):
        DataConfig(transform="center", cached_views=2)


def test_views_cannot_be_stored_if_the_image_side_is_trained(image_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cached_views is 2, but mocoop .* learns on the image side"):
        run(
            dataclasses.replace(
                config(image_folder, "runs", "mocoop", cached_views=2), settings={"tune_layer_norms": True}
            )
        )
