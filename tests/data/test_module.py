"""The data module: batches, independent of processes, workers and resuming."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.fixtures.processes import in_group
from vlprompt.data import FewShotData
from vlprompt.data.tally import tally
from vlprompt.datasets import FewShotTask
from vlprompt.errors import ConfigError, DataError


class World(FewShotData):
    """A data module with a fixed rank and world size."""

    rank, world = 0, 1

    def _world(self) -> tuple[int, int]:
        return self.rank, self.world


@pytest.fixture
def task(toy_task: Callable[..., FewShotTask]) -> FewShotTask:
    return toy_task(11)


def epoch(data: FewShotData, number: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def images_by_index(batches: list[dict[str, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {int(i): image for batch in batches for i, image in zip(batch["index"], batch["images"], strict=True)}


def test_batches(task: FewShotTask, preprocess: Any) -> None:
    data = FewShotData(task, preprocess, batch_size=4, test_batch_size=5)
    batches = epoch(data)
    assert len(batches) == len(data.train_dataloader()) == 2
    for batch in batches:
        assert batch["images"].shape == (4, 3, 16, 16) and batch["images"].dtype == torch.float32
        assert batch["labels"].tolist() == [task.train[i].label for i in batch["index"].tolist()]
        assert batch["scale"].shape == () and batch["scale"] == 1.0
    tested = list(data.test_dataloader())
    assert [len(batch["index"]) for batch in tested] == [5, 2]
    assert torch.cat([batch["index"] for batch in tested]).tolist() == list(range(7))


def test_images_depend_on_seed_epoch_and_index_only(task: FewShotTask, preprocess: Any) -> None:
    plain = images_by_index(epoch(FewShotData(task, preprocess, batch_size=4, seed=5), 3))
    torch.manual_seed(99)
    torch.rand(7)
    for other in (dict(batch_size=2), dict(batch_size=4, workers=2), dict(batch_size=11)):
        again = images_by_index(epoch(FewShotData(task, preprocess, seed=5, **other), 3))  # type: ignore[arg-type]
        for index in plain.keys() & again.keys():
            assert torch.equal(plain[index], again[index])
    changed = images_by_index(epoch(FewShotData(task, preprocess, batch_size=11, seed=5), 4))
    assert any(not torch.equal(plain[index], changed[index]) for index in plain)


def test_the_global_generator_keeps_its_state(task: FewShotTask, preprocess: Any) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batch = FewShotData(task, preprocess, batch_size=4).train_dataloader().dataset.__getitems__([(0, 1), (0, 2)])  # type: ignore[attr-defined]
    assert len(batch["index"]) == 2
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_two_processes_see_the_batches_of_one(batch_size: int, task: FewShotTask, preprocess: Any) -> None:
    whole = epoch(FewShotData(task, preprocess, batch_size=batch_size), 2)
    ranks = []
    for rank in range(2):
        data = World(task, preprocess, batch_size=batch_size)
        data.rank, data.world = rank, 2
        ranks.append(epoch(data, 2))
    for step, batch in enumerate(whole):
        for name in ("images", "labels", "index"):
            assert torch.equal(torch.cat([batches[step][name] for batches in ranks]), batch[name])
        means = [batches[step]["scale"] * batches[step]["images"].mean((1, 2, 3)).mean() for batches in ranks]
        torch.testing.assert_close(torch.stack(means).mean(), batch["images"].mean((1, 2, 3)).mean())
    assert [len(batches) for batches in ranks] == [len(whole)] * 2


def test_cached_features(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, ::97]

    def build(transform: str = "center", **changes: Any) -> FewShotData:
        settings = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", **changes}
        return FewShotData(task, preprocess, batch_size=4, transform=transform, **settings)

    data = build()
    data.prepare_data()
    assert sum(calls) == 21
    data.setup("fit")
    batches = epoch(data)
    assert "images" not in batches[0] and batches[0]["features"].shape == (4, 8)
    center = FewShotData(task, preprocess, batch_size=4, transform="center")
    for cached, live in zip(batches, epoch(center), strict=True):
        assert torch.equal(cached["index"], live["index"])
        torch.testing.assert_close(cached["features"], live["images"].flatten(1)[:, ::97])
    again = build()
    again.prepare_data()
    again.setup()
    assert sum(calls) == 21, "the second run encodes nothing"
    random = build("random")
    assert "images" in epoch(random)[0] and "features" in next(iter(random.test_dataloader()))
    build(fingerprint="g").prepare_data()
    assert sum(calls) == 42
    first, second = (Path(sample.source.path) for sample in task.test[:2])  # type: ignore[attr-defined]
    os.utime(first, ns=(1, 1))
    build().prepare_data()
    assert sum(calls) == 42, "the same content has the same features"
    contents = first.read_bytes(), second.read_bytes()
    for path, content in zip((second, first), contents, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    build().prepare_data()
    assert sum(calls) == 49, "exchanged files have other features"


def test_keys_say_what_they_follow(task: FewShotTask, preprocess: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [FewShotData(task, preprocess).feature_key("test")]
    monkeypatch.setattr("vlprompt.datasets.images.HASHED_BYTES", 10)
    keys.append(FewShotData(task, preprocess).feature_key("test"))
    assert keys[0]["stamps"] == "content" and "stamps" not in keys[1]
    assert keys[0]["samples_sha256"] != keys[1]["samples_sha256"]


def test_features_need_a_fingerprint_and_an_encoder(task: FewShotTask, preprocess: Any) -> None:
    with pytest.raises(ConfigError, match="fingerprint"):
        FewShotData(task, preprocess, encode=lambda images: images)
    with pytest.raises(ConfigError, match="without encode"):
        FewShotData(task, preprocess).features("test")
    with pytest.raises(ConfigError, match="Unknown split 'dev'"):
        FewShotData(task, preprocess, encode=lambda images: images, fingerprint="f").features("dev")


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"test_batch_size": 0},
        {"workers": -1},
        {"seed": -1},
        {"seed": None},
        {"transform": "left"},
        {"on_bad_image": "skp"},
        {"cached_views": -1},
        {"cached_views": 2},
        {"keep_bytes": -1},
    ],
)
def test_bad_settings(settings: dict[str, Any], task: FewShotTask, preprocess: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FewShotData(task, preprocess, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_names_the_file_without_a_traceback(workers: int, task: FewShotTask, preprocess: Any) -> None:
    bad = Path(task.train[3].source.path)  # type: ignore[attr-defined]
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        epoch(FewShotData(task, preprocess, batch_size=11, workers=workers))
    assert f"{bad} cannot be decoded (60 bytes" in str(caught.value) and "Traceback" not in str(caught.value)


def encode(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, ::97]


@pytest.mark.parametrize("views", [1, 3])
def test_cached_views_are_the_views_of_their_epochs(
    views: int, task: FewShotTask, preprocess: Any, tmp_path: Path
) -> None:
    live = FewShotData(task, preprocess, batch_size=4, seed=3)

    def build(seed: int = 3) -> FewShotData:
        cached = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", "cached_views": views}
        return FewShotData(task, preprocess, batch_size=4, seed=seed, **cached)

    data, again, other = build(), build(), build(4)
    for number in range(4):
        batches, shown = epoch(data, number), images_by_index(epoch(live, number % views))
        everything = images_by_index(epoch(FewShotData(task, preprocess, batch_size=11, seed=3), number % views))
        assert [batch["index"].tolist() for batch in batches] == [b["index"].tolist() for b in epoch(live, number)]
        for batch in batches:
            assert "images" not in batch
            expected = encode(torch.stack([everything[index] for index in batch["index"].tolist()]))
            assert torch.equal(batch["features"], expected)
        assert shown.keys() <= everything.keys()
        for batch, repeated in zip(batches, epoch(again, number), strict=True):
            assert torch.equal(batch["features"], repeated["features"])
    assert data.store.encoded == 11 * views and again.store.encoded == 0
    assert not torch.equal(epoch(other)[0]["features"], epoch(data)[0]["features"])
    assert "features" in next(iter(data.test_dataloader()))


def spoil(task: FewShotTask, split: str, *positions: int) -> set[str]:
    """Truncate the images at ``positions``, and remove every second of them."""
    samples = getattr(task, split)
    for number, position in enumerate(positions):
        path = Path(samples[position].source.path)
        path.unlink() if number % 2 else path.write_bytes(path.read_bytes()[:60])
    return {samples[position].id for position in positions}


@pytest.mark.parametrize("how", ["images", "center", "cached views", "workers"])
def test_skipping(how: str, task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    bad = spoil(task, "train", 3, 8) | spoil(task, "test", 0, 1, 2, 5)
    settings: dict[str, Any] = {"on_bad_image": "skip", "test_batch_size": 3, "features": tmp_path / "store"}
    if how == "workers":
        settings["workers"] = 2
    if how in ("center", "cached views"):
        settings |= {"encode": encode, "fingerprint": "f", "transform": "center" if how == "center" else "random"}
        settings |= {"cached_views": 2 if how == "cached views" else 0}
    data = FewShotData(task, preprocess, batch_size=9, **settings)
    with pytest.warns(UserWarning, match="skipped: 6 .*on_bad_image"), tally() as counts:
        for number in range(2):
            (batch,) = epoch(data, number)
            assert sorted(batch["index"].tolist()) == [0, 1, 2, 4, 5, 6, 7, 9, 10]
            assert batch["labels"].tolist() == [task.train[index].label for index in batch["index"].tolist()]
            assert all(torch.isfinite(value).all() and len(value) in (0, 9) for value in batch.values() if value.ndim)
        batches = list(data.test_dataloader())
    assert [index for batch in batches for index in batch["index"].tolist()] == [3, 4, 6]
    assert all(len(batch["index"]) for batch in batches) and "skipped" not in batches[0]
    skipped = counts.facts()["skipped"]
    assert (skipped["train"], skipped["val"], skipped["test"]) == (2, 0, 4) and set(skipped["ids"]) == bad


def test_skipping_does_not_change_the_readable_images(task: FewShotTask, preprocess: Any) -> None:
    whole = images_by_index(epoch(FewShotData(task, preprocess, batch_size=11), 2))
    spoil(task, "train", 3)
    rest = images_by_index(epoch(FewShotData(task, preprocess, batch_size=10, on_bad_image="skip"), 2))
    assert rest.keys() == whole.keys() - {3}
    assert all(torch.equal(image, whole[index]) for index, image in rest.items())


def test_two_processes_that_skip_see_the_batches_of_one(task: FewShotTask, preprocess: Any) -> None:
    spoil(task, "train", 3, 8, 9)
    (whole,) = epoch(FewShotData(task, preprocess, batch_size=10, on_bad_image="skip"), 2)
    batches = []
    for rank in range(2):
        data = World(task, preprocess, batch_size=10, on_bad_image="skip")
        data.rank, data.world = rank, 2
        batches += epoch(data, 2)
    assert len(whole["index"]) == 8 and [len(batch["index"]) for batch in batches] == [4, 4]
    assert torch.equal(torch.cat([batch["images"] for batch in batches]), whole["images"])
    assert [float(batch["scale"]) for batch in batches] == [1.0, 1.0]


def test_skipped_features_raise_without_skip(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    good = Path(task.test[2].source.path).read_bytes()  # type: ignore[attr-defined]
    spoil(task, "test", 2)

    def build(**more: Any) -> FewShotData:
        settings = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", **more}
        return FewShotData(task, preprocess, **settings)

    assert not build(on_bad_image="skip").features("test")[2].any()
    with pytest.raises(DataError, match="test/2.png cannot be decoded"):
        build().features("test")
    path = Path(task.test[2].source.path)  # type: ignore[attr-defined]
    path.write_bytes(good)
    assert build().features("test")[2].any()


def test_nothing_readable(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    spoil(task, "train", *range(11))
    with pytest.raises(DataError, match="None of the 11 training images can be read"):
        FewShotData(task, preprocess, on_bad_image="skip").train_dataloader()
    cached: dict[str, Any] = {"encode": encode, "fingerprint": "f", "features": tmp_path, "transform": "center"}
    with pytest.raises(DataError, match="None of the 11 images can be read"):
        FewShotData(task, preprocess, on_bad_image="skip", **cached).train_dataloader()
    spoil(task, "test", *range(7))
    assert list(FewShotData(task, preprocess, on_bad_image="skip").test_dataloader()) == []


def test_multi_label_tasks_have_rows_of_ones_and_zeros(task: FewShotTask, preprocess: Any) -> None:
    labels: tuple[Any, ...] = ((0,), (0, 1), ())
    train = [dataclasses.replace(sample, label=labels[n % 3]) for n, sample in enumerate(task.train)]

    class MultiLabel(FewShotTask):
        multilabel = True  # type: ignore[assignment]

    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    (batch,) = epoch(FewShotData(MultiLabel(**{**fields, "train": train}), preprocess, batch_size=11))
    rows = {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [0.0, 0.0]}
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [rows[index % 3] for index in batch["index"].tolist()]


class BatchRecorder(pl.LightningModule):
    """Records the dtypes of transferred batches, and the images of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.transferred: list[torch.dtype] = []
        self.images: list[torch.Tensor] = []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.transferred.append(batch["images"].dtype)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.images.append(batch["images"])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_transfers_uint8_and_normalises_afterwards(task: FewShotTask, preprocess: Any) -> None:
    data, module = FewShotData(task, preprocess, batch_size=4), BatchRecorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    assert set(module.transferred) == {torch.uint8}
    plain = FewShotData(task, preprocess, batch_size=4)
    expected = [batch["images"] for number in range(2) for batch in epoch(plain, number)]
    assert len(module.images) == 4 and all(map(torch.equal, module.images, expected))
    # Without a running Trainer, the loader normalises batches.
    assert torch.equal(epoch(data)[0]["images"], expected[0])


def test_test_images_are_not_cached(task: FewShotTask, preprocess: Any) -> None:
    data = FewShotData(task, preprocess, batch_size=11)
    for loader, kept in ((data.train_dataloader(), 11), (data.val_dataloader(), 3), (data.test_dataloader(), 0)):
        assert len(list(loader)) > 0
        assert loader.dataset.cache.kept() == kept  # type: ignore[union-attr]


def test_no_validation_images(task: FewShotTask, preprocess: Any) -> None:
    assert FewShotData(dataclasses.replace(task, val=[]), preprocess).val_dataloader() == []


class Recorder(pl.LightningModule):
    """Records the indices of the batches of a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[Any]] = {"train": [], "test": []}

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen["train"].append((self.current_epoch, batch["index"].tolist()))
        return self.weight.sum() * batch["scale"]

    def test_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.seen["test"] += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit_and_test(task: FewShotTask, preprocess: Any, batch_size: int, devices: int) -> dict[str, list[Any]]:
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2} if devices == 2 else {"devices": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    module = Recorder()
    data = FewShotData(task, preprocess, batch_size=batch_size, test_batch_size=2, on_bad_image="skip")
    with tally() as counts:
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        return {**module.seen, "facts": [counts.facts()]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch_size", "tests", "bad"), [(4, 7, ()), (16, 1, ()), (16, 7, (1, 4))])
def test_lightning_on_two_processes(
    batch_size: int, tests: int, bad: tuple[int, ...], task: FewShotTask, preprocess: Any
) -> None:
    task = dataclasses.replace(task, test=task.test[:tests])
    ids = sorted(spoil(task, "train", *bad)) + sorted(spoil(task, "test", *bad))
    single = _fit_and_test(task, preprocess, batch_size, 1)
    seen = in_group(2, _fit_and_test, task, preprocess, batch_size, 2)
    for step, (number, indices) in enumerate(single["train"]):
        assert seen[0]["train"][step][0] == seen[1]["train"][step][0] == number
        assert seen[0]["train"][step][1] + seen[1]["train"][step][1] == indices
    assert len(seen[0]["train"]) == len(seen[1]["train"]) == len(single["train"])
    readable = [position for position in range(tests) if position not in bad]
    assert sorted(seen[0]["test"] + seen[1]["test"]) == sorted(single["test"]) == readable
    skipped = {"train": len(bad), "val": 0, "test": len(bad), "ids": ids}
    assert seen[0]["facts"] == seen[1]["facts"] == single["facts"] == [{"encoded": 0, "skipped": skipped}]
