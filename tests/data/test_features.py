"""The feature store: computed once, never half written, never believed when damaged."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.data import FeatureStore, FileSource, Sample, extract
from vlprompt.errors import ConfigError, DataError

KEY = {"backbone": "abc", "view": "center", "n": 3}


class Counter:
    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.full((4, 3), self.value)


def test_computed_once(tmp_path: Path) -> None:
    store, compute = FeatureStore(tmp_path / "store"), Counter()
    assert torch.equal(store.get(KEY, compute), torch.ones(4, 3))
    assert torch.equal(FeatureStore(tmp_path / "store").get(dict(reversed(KEY.items())), compute), torch.ones(4, 3))
    assert compute.calls == 1
    assert [path.name for path in (tmp_path / "store").iterdir()] == [store.path(KEY).name]
    store.get({**KEY, "n": 4}, compute)
    assert compute.calls == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other key"])
def test_a_damaged_entry_is_computed_again(damage: str, tmp_path: Path) -> None:
    store, compute = FeatureStore(tmp_path), Counter()
    store.get(KEY, compute)
    path = store.path(KEY)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "other key":
        store.get({"n": 5}, Counter(2.0))
        data = bytearray(store.path({"n": 5}).read_bytes())
    path.write_bytes(bytes(data[: {"cut": len(data) - 5, "empty": 0}.get(damage, len(data))]))
    assert torch.equal(store.get(KEY, compute), torch.ones(4, 3))
    assert compute.calls == 2
    assert torch.equal(store.get(KEY, compute), torch.ones(4, 3)) and compute.calls == 2


def test_a_failing_computation_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        FeatureStore(tmp_path).get(KEY, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to .*VLPROMPT_CACHE"):
        FeatureStore(tmp_path / "file" / "store").get(KEY, Counter())


def test_keys_are_json() -> None:
    with pytest.raises(ConfigError, match="JSON values"):
        FeatureStore("x").path({"a": object()})


def _write_often(folder: str) -> None:
    for _ in range(20):
        store = FeatureStore(folder)
        store._write(store.path(KEY), '{"backbone":"abc","n":3,"view":"center"}', torch.ones(4, 3))


def test_concurrent_writers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(tmp_path),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    compute = Counter()
    for _ in range(50):
        assert torch.equal(FeatureStore(tmp_path).get(KEY, compute), torch.ones(4, 3))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(tmp_path) == [FeatureStore(tmp_path).path(KEY).name]


def to_tensor(picture: Any) -> torch.Tensor:
    return torch.tensor(picture.getpixel((3, 3)), dtype=torch.float32).view(3, 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_extract(workers: int, tmp_path: Path, paint: Callable[..., Path]) -> None:
    samples = [Sample(f"{n}.png", 0, FileSource(str(paint(tmp_path / f"{n}.png", n)))) for n in range(7)]
    features = extract(lambda images: images.flatten(1) * 2, samples, to_tensor, batch_size=3, workers=workers)
    expected = torch.stack([to_tensor(sample.source.open()).flatten() * 2 for sample in samples])
    assert torch.equal(features, expected) and not features.requires_grad and not features.is_inference()


@pytest.mark.parametrize("workers", [0, 2])
def test_extract_names_a_bad_image_without_a_traceback(workers: int, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    samples = [Sample("bad.png", 0, FileSource(str(tmp_path / "bad.png")))]
    with pytest.raises(DataError) as caught:
        extract(lambda images: images.flatten(1), samples, to_tensor, workers=workers)
    assert "bad.png cannot be decoded (7 bytes" in str(caught.value) and "Traceback" not in str(caught.value)


def test_extract_nothing() -> None:
    with pytest.raises(DataError, match="no images"):
        extract(lambda images: images, [], to_tensor)
