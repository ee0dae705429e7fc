"""Views of test images: batches, independence of views, and stored features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vlprompt.data import FewShotData, view_features
from vlprompt.data import features as store_module
from vlprompt.data.multi_view import MultiViewImages, RandomViews
from vlprompt.data.tally import tally
from vlprompt.data.transforms import Transform
from vlprompt.datasets import FewShotTask, FileSource
from vlprompt.errors import ConfigError, DataError
from vlprompt.needs import TestViews


@pytest.fixture
def task(toy_task: Callable[..., FewShotTask]) -> FewShotTask:
    return toy_task(5)


class Encoder:
    """An encoder that counts images."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return images.flatten(1)[:, ::97]


class Bank:
    """A bank of flat images, coloured by the source's position and the number."""

    recipe_id = "r1"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def images(self, source: Any, count: int) -> list[Image.Image]:
        self.asked.append((Path(source.path).stem, count))
        number = int(Path(source.path).stem)
        return [Image.new("RGB", (20, 30), (10 * number, 40 * index, 0)) for index in range(count)]


def build(task: FewShotTask, preprocess: Any, folder: Path, encode: Any = None, **more: Any) -> FewShotData:
    settings: dict[str, Any] = {"encode": encode or Encoder(), "fingerprint": "f", "features": folder / "store"}
    settings |= {"test_batch_size": 4, "workers": 0, **more}
    return FewShotData(task, preprocess, **settings)


def features(data: FewShotData) -> torch.Tensor:
    return torch.cat([batch["features"] for batch in data.test_dataloader()])


def test_batches_of_features(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    data = build(task, preprocess, tmp_path, test_views=TestViews(3, generated=2), generated=Bank())
    batches = list(data.test_dataloader())
    assert [tuple(batch["features"].shape) for batch in batches] == [(4, 6, 8), (3, 6, 8)]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6]]
    views = features(data)
    assert torch.equal(views[:, 0], data.features("test")), "view 0 is the test view, bit for bit"
    assert torch.equal(views[:, 1:4], data.view_features("test", 3, "crop").transpose(0, 1))
    center = Transform(preprocess, "center")
    for number in range(7):
        for index in range(2):
            expected = center(Image.new("RGB", (20, 30), (10 * number, 40 * index, 0)))[None]
            torch.testing.assert_close(views[number, 4 + index], Encoder()(expected)[0])
    assert torch.equal(next(iter(data.val_dataloader()))["features"], data.features("val"))  # type: ignore[arg-type]


@pytest.mark.parametrize("augmix", [False, True])
def test_views_as_images_match_the_stored_features(
    augmix: bool, task: FewShotTask, preprocess: Any, tmp_path: Path
) -> None:
    views: dict[str, Any] = {"test_views": TestViews(3, augmix, 1), "generated": Bank()}
    data = build(task, preprocess, tmp_path, test_batch_size=11, views_as_images=True, **views)
    batches = list(data.test_dataloader())
    assert [tuple(batch["images"].shape) for batch in batches] == [(2, 5, 3, 16, 16)] * 3 + [(1, 5, 3, 16, 16)]
    images = torch.cat([batch["images"] for batch in batches])
    assert images.dtype == torch.float32
    stored = features(build(task, preprocess, tmp_path, **views))
    torch.testing.assert_close(Encoder()(images.flatten(0, 1)).unflatten(0, (7, 5)), stored, rtol=0, atol=1e-6)
    plain = FewShotData(task, preprocess, views_as_images=True, workers=0, test_views=TestViews(0))
    center = torch.cat([batch["images"] for batch in plain.test_dataloader()])
    assert center.shape == (7, 1, 3, 16, 16) and torch.equal(center[:, 0], images[:, 0])


def test_a_trainer_transfers_uint8(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    data = FewShotData(task, preprocess, views_as_images=True, workers=0, test_views=TestViews(2))
    loader = data.test_dataloader()
    raw = loader.dataset.__getitems__([(0, 1)])  # type: ignore[attr-defined]
    assert raw["images"].dtype == torch.uint8
    finished = data.on_after_batch_transfer(raw, 0)["images"]
    assert torch.equal(finished, list(loader)[0]["images"][1:2])


def test_a_view_depends_on_seed_image_and_number_only(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    whole = build(task, preprocess, tmp_path, seed=2).view_features("test", 4, "crop")
    turned = dataclasses.replace(task, test=task.test[::-1][:5])
    other = build(turned, preprocess, tmp_path / "other", seed=2, workers=2, test_batch_size=3)
    assert torch.equal(other.view_features("test", 2, "crop"), whole.flip(1)[:2, :5])
    assert not torch.equal(build(task, preprocess, tmp_path, seed=3).view_features("test", 4, "crop"), whole)
    assert len({tuple(view.flatten().tolist()) for view in whole}) == 4


def test_view_features(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    data = build(task, preprocess, tmp_path)
    for split, number in (("train", 5), ("val", 3), ("test", 7)):
        test_view = data.view_features(split, 0, "center")
        assert test_view.shape == (1, number, 8) and torch.equal(test_view[0], data.features(split))
        random, half = (data.view_features(split, 2, kind) for kind in ("random", "random-half"))
        assert random.shape == half.shape == (2, number, 8) and not torch.equal(random, half)
    with pytest.raises(ConfigError, match="-1 views"):
        data.view_features("train", -1, "random")
    with pytest.raises(ConfigError, match="2 views of kind 'center'"):
        data.view_features("train", 2, "center")
    with pytest.raises(ConfigError, match="'randon'. Did you mean 'random'"):
        data.view_features("train", 2, "randon")
    with pytest.raises(ConfigError, match="Unknown split 'dev'"):
        data.view_features("dev", 2, "random")
    with pytest.raises(ConfigError, match="without encode"):
        FewShotData(task, preprocess).view_features("train", 2, "random")


def test_computed_once_and_shared(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    views: dict[str, Any] = {"test_views": TestViews(15, generated=1)}
    first, second = Encoder(), Encoder()
    fifteen = features(build(task, preprocess, tmp_path, first, generated=Bank(), **views))
    assert first.images == 7 * (1 + 16 + 1), "16 crops, shared by methods that use 15 and methods that use 16"
    bank = Bank()
    assert torch.equal(features(build(task, preprocess, tmp_path, second, generated=bank, **views)), fifteen)
    sixteen = features(build(task, preprocess, tmp_path, second, test_views=TestViews(16)))
    assert second.images == 0 and bank.asked == []
    assert torch.equal(sixteen[:, :16], fifteen[:, :16])
    changed = Bank()
    changed.recipe_id = "r2"
    features(build(task, preprocess, tmp_path, second, generated=changed, **views))
    assert second.images == 7 and len(changed.asked) == 7


def test_prepare_data_computes_what_the_test_needs(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    encode = Encoder()
    data = build(task, preprocess, tmp_path, encode, test_views=TestViews(2))
    data.setup("test")
    assert encode.images == 7 * 3
    features(data)
    assert encode.images == 7 * 3


class Killed(Exception):
    pass


def test_a_killed_run_resumes_at_its_block(
    task: FewShotTask, preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(task, preprocess, tmp_path / "whole").view_features("test", 3, "crop")
    monkeypatch.setattr(view_features, "BLOCK_VIEWS", 6)  # two images a block

    class Dies(Encoder):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if self.images >= 12:
                raise Killed
            return super().__call__(images)

    with pytest.raises(Killed):
        build(task, preprocess, tmp_path, Dies()).view_features("test", 3, "crop")
    encode = Encoder()
    data = build(task, preprocess, tmp_path, encode)
    assert torch.equal(data.view_features("test", 3, "crop"), expected)
    assert encode.images == 3 * 3, "two blocks of two are stored"
    batches = list(build(task, preprocess, tmp_path, encode, test_views=TestViews(3)).test_dataloader())
    assert torch.equal(torch.cat([batch["features"] for batch in batches])[:, 1:], expected.transpose(0, 1))


def test_each_image_is_decoded_once_for_its_views(
    task: FewShotTask, preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    whole = FileSource.open

    def counted(self: FileSource) -> Image.Image:
        opened.append(self.path)
        return whole(self)

    monkeypatch.setattr(FileSource, "open", counted)
    build(task, preprocess, tmp_path).view_features("test", 9, "augmix")
    assert len(opened) == len(set(opened)) == 7
    opened.clear()
    assert len(
        list(FewShotData(task, preprocess, views_as_images=True, workers=0, test_views=TestViews(4)).test_dataloader())
    )
    assert len(opened) == len(set(opened)) == 7


@pytest.mark.parametrize("images", [False, True])
def test_skipping(images: bool, task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    whole = features(build(task, preprocess, tmp_path / "whole", test_views=TestViews(2)))
    for position in (0, 1, 5):
        Path(task.test[position].source.path).write_bytes(b"none")  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"test_views": TestViews(2), "views_as_images": images}
    data = build(task, preprocess, tmp_path, on_bad_image="skip", **settings)
    with pytest.warns(UserWarning, match="skipped: 3 "), tally() as counts:
        batches = list(data.test_dataloader())
    assert [index for batch in batches for index in batch["index"].tolist()] == [2, 3, 4, 6]
    assert counts.facts()["skipped"]["test"] == 3
    views = torch.cat([batch["images" if images else "features"] for batch in batches])
    views = Encoder()(views.flatten(0, 1)).unflatten(0, (4, 3)) if images else views
    torch.testing.assert_close(views, whole[[2, 3, 4, 6]], rtol=0, atol=1e-6)
    assert data.unreadable("test") == (0, 1, 5)
    assert not data.view_features("test", 2, "crop")[:, [0, 1, 5]].any()
    with pytest.raises(DataError, match="0.png cannot be decoded"):
        list(build(task, preprocess, tmp_path, **settings).test_dataloader())


def test_a_block_without_a_readable_image(
    task: FewShotTask, preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_features, "BLOCK_VIEWS", 4)
    for position in (2, 3):
        Path(task.test[position].source.path).unlink()  # type: ignore[attr-defined]
    data = build(task, preprocess, tmp_path, on_bad_image="skip", test_views=TestViews(2))
    assert features(data).shape == (5, 3, 8)
    assert not data.view_features("test", 2, "crop")[:, 2:4].any()
    for sample in task.test:
        Path(sample.source.path).unlink(missing_ok=True)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="None of the 7 images can be read"):
        build(task, preprocess, tmp_path / "none", on_bad_image="skip").view_features("test", 2, "crop")
    with pytest.raises(DataError, match="There are no images"):
        build(dataclasses.replace(task, val=[]), preprocess, tmp_path).view_features("val", 2, "crop")


def test_missing_generated_images_raise_even_with_skip(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    class Empty(Bank):
        def images(self, source: Any, count: int) -> list[Image.Image]:
            raise DataError("no generated images")

    for images in (False, True):
        settings: dict[str, Any] = {"views_as_images": images, "on_bad_image": "skip", "generated": Empty()}
        with pytest.raises(DataError, match="no generated images"):
            list(build(task, preprocess, tmp_path, test_views=TestViews(0, generated=1), **settings).test_dataloader())


def test_refused(task: FewShotTask, preprocess: Any) -> None:
    with pytest.raises(ConfigError, match="encode= or views_as_images=True"):
        FewShotData(task, preprocess, test_views=TestViews(2))
    with pytest.raises(ConfigError, match="2 generated images: pass their bank"):
        FewShotData(task, preprocess, views_as_images=True, test_views=TestViews(1, generated=2))


def test_ranks_share_test_images(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    class World(FewShotData):
        rank = 0

        def _world(self) -> tuple[int, int]:
            return self.rank, 2

    features_of: dict[int, torch.Tensor] = {}
    for rank in range(2):
        settings: dict[str, Any] = {"encode": Encoder(), "fingerprint": "f", "features": tmp_path / "store"}
        data = World(task, preprocess, workers=0, test_views=TestViews(2), **settings)
        data.rank = rank
        for batch in data.test_dataloader():
            features_of |= dict(zip(batch["index"].tolist(), batch["features"], strict=True))
    whole = features(build(task, preprocess, tmp_path, test_views=TestViews(2)))
    assert torch.equal(torch.stack([features_of[index] for index in range(7)]), whole)


def test_more_views_than_a_batch(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    """The encoder gets at most as many images as a test batch has."""
    sizes: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return Encoder()(images)

    views = build(task, preprocess, tmp_path, encode, test_batch_size=4).view_features("test", 9, "crop")
    assert max(sizes) <= 4 and sum(sizes) == 63
    images = MultiViewImages(task.test, [RandomViews(preprocess, "crop", 9, 1)], torch.zeros(7))
    before = torch.get_rng_state()
    raw = images.__getitems__([(0, 3)])["images"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(views[:, 3], Encoder()(Transform(preprocess, "crop").finish(raw[0])))


def test_an_entry_of_another_number_of_views_is_computed_again(
    task: FewShotTask, preprocess: Any, tmp_path: Path
) -> None:
    expected = build(task, preprocess, tmp_path).view_features("test", 4, "crop").clone()
    for path in (tmp_path / "store").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if tensors["features"].ndim == 3:
            tensors["features"] = tensors["features"][:, :2].contiguous()
            save_file(tensors, path, {**metadata, "sha256": store_module._sha256(tensors)})
    assert torch.equal(build(task, preprocess, tmp_path).view_features("test", 4, "crop"), expected)
