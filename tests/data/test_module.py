"""The data module: what batches hold, and that processes, workers and resuming change nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from vlprompt.data import FewShotData, FewShotTask, FileSource, Sample, find_card
from vlprompt.errors import ConfigError, DataError


class World(FewShotData):
    """A data module that believes to be rank ``rank`` of ``world``."""

    rank, world = 0, 1

    def _world(self) -> tuple[int, int]:
        return self.rank, self.world


@pytest.fixture
def task(tmp_path: Path, paint: Callable[..., Path]) -> FewShotTask:
    parts = {
        part: [
            Sample(f"{part}/{n}.png", n % 2, FileSource(str(paint(tmp_path / part / f"{n}.png", start + n))))
            for n in range(count)
        ]
        for part, count, start in (("train", 11, 0), ("val", 3, 20), ("test", 7, 30))
    }
    return FewShotTask(
        "toy",
        ["a", "b"],
        ["a", "b"],
        "a {}.",
        **parts,
        shots=6,
        seed=1,
        classes="all",
        split_sha256="s",
        shots_sha256="t",
        card=find_card("folder"),
    )


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


def test_the_global_generator_is_left_alone(task: FewShotTask, preprocess: Any) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batch = FewShotData(task, preprocess, batch_size=4).train_dataloader().dataset.__getitems__([(0, 1), (0, 2)])  # type: ignore[attr-defined]
    assert len(batch["index"]) == 2
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_two_processes_see_the_batches_of_one(batch_size: int, task: FewShotTask, preprocess: Any) -> None:
    whole = epoch(FewShotData(task, preprocess, batch_size=batch_size), 2)
    parts = []
    for rank in range(2):
        data = World(task, preprocess, batch_size=batch_size)
        data.rank, data.world = rank, 2
        parts.append(epoch(data, 2))
    for step, batch in enumerate(whole):
        for name in ("images", "labels", "index"):
            assert torch.equal(torch.cat([part[step][name] for part in parts]), batch[name])
        sums = [part[step]["scale"] * part[step]["images"].mean((1, 2, 3)).mean() for part in parts]
        torch.testing.assert_close(torch.stack(sums).mean(), batch["images"].mean((1, 2, 3)).mean())
    assert [len(part) for part in parts] == [len(whole)] * 2


def test_cached_features(task: FewShotTask, preprocess: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, ::97]

    def build(view: str = "center", **changes: Any) -> FewShotData:
        settings = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", **changes}
        return FewShotData(task, preprocess, batch_size=4, view=view, **settings)

    data = build()
    data.prepare_data()
    assert sum(calls) == 21
    data.setup("fit")
    batches = epoch(data)
    assert "images" not in batches[0] and batches[0]["features"].shape == (4, 8)
    center = FewShotData(task, preprocess, batch_size=4, view="center")
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
    source = Path(task.test[0].source.path)  # type: ignore[attr-defined]
    os.utime(source, ns=(1, 1))  # a file that was replaced is not believed to be the old one
    build().prepare_data()
    assert sum(calls) == 49


def test_features_need_a_fingerprint_and_an_encoder(task: FewShotTask, preprocess: Any) -> None:
    with pytest.raises(ConfigError, match="fingerprint"):
        FewShotData(task, preprocess, encode=lambda images: images)
    with pytest.raises(ConfigError, match="without encode"):
        FewShotData(task, preprocess).features("test")
    with pytest.raises(ConfigError, match="Unknown split 'dev'"):
        FewShotData(task, preprocess, encode=lambda images: images, fingerprint="f").features("dev")


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"test_batch_size": 0}, {"workers": -1}, {"seed": -1}, {"seed": None}, {"view": "left"}],
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


def test_no_validation_images(task: FewShotTask, preprocess: Any) -> None:
    assert FewShotData(dataclasses.replace(task, val=[]), preprocess).val_dataloader() == []


class Recorder(pl.LightningModule):
    """Writes down the indices that a rank is given."""

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


def _rank(rank: int, port: int, task: FewShotTask, preprocess: Any, batch_size: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    results.put((rank, _fit_and_test(task, preprocess, batch_size, 2)))


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
    data = FewShotData(task, preprocess, batch_size=batch_size, test_batch_size=2)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch_size", "tests"), [(4, 7), (16, 1)])
def test_lightning_on_two_processes(batch_size: int, tests: int, task: FewShotTask, preprocess: Any) -> None:
    task = dataclasses.replace(task, test=task.test[:tests])
    one = _fit_and_test(task, preprocess, batch_size, 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (port, task, preprocess, batch_size, results)
    workers = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    seen = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(30)
    for step, (number, indices) in enumerate(one["train"]):
        assert seen[0]["train"][step][0] == seen[1]["train"][step][0] == number
        assert seen[0]["train"][step][1] + seen[1]["train"][step][1] == indices
    assert len(seen[0]["train"]) == len(seen[1]["train"]) == len(one["train"])
    assert sorted(seen[0]["test"] + seen[1]["test"]) == sorted(one["test"]) == list(range(tests))
