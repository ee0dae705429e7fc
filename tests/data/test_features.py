"""The feature store: computed once, written atomically, damaged entries are computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt.data import FeatureStore, extract
from vlprompt.data import test_transform as clip_transform
from vlprompt.data.features import Rows
from vlprompt.data.tally import images_encoded, tally
from vlprompt.datasets import FileSource, Sample
from vlprompt.errors import ConfigError, DataError

KEY = {"backbone": "abc", "view": "center", "n": 3}


class Counter:
    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.full((4, 3), self.value)


def entries(folder: Path) -> list[str]:
    """Files of a store except locks."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks")


def test_computed_once(tmp_path: Path) -> None:
    store, compute = FeatureStore(tmp_path / "store"), Counter()
    assert torch.equal(store.get(KEY, compute), torch.ones(4, 3))
    assert torch.equal(FeatureStore(tmp_path / "store").get(dict(reversed(KEY.items())), compute), torch.ones(4, 3))
    assert compute.calls == 1
    assert entries(tmp_path / "store") == [store.path(KEY).name]
    store.get({**KEY, "n": 4}, compute)
    assert compute.calls == 2


def test_encoded_images_are_counted(tmp_path: Path) -> None:
    before, store = images_encoded(), FeatureStore(tmp_path)
    with tally() as counts:
        store.get(KEY, Counter())
        store.get(KEY, Counter())
        store.rows({"n": 1}, lambda: Rows(torch.zeros(5, 2), (1, 3)))
    again = FeatureStore(tmp_path)
    assert again.rows({"n": 1}, lambda: pytest.fail("computed again")).missing == (1, 3)
    assert (store.encoded, again.encoded, counts.encoded, images_encoded() - before) == (7, 0, 7, 7)


def test_entries_are_memory_mapped(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("maps are read from /proc")
    tensor = FeatureStore(tmp_path).get(KEY, Counter())
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            mappings.append(line)
    assert len(mappings) == 1 and mappings[0].endswith(FeatureStore(tmp_path).path(KEY).name)


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
    path.unlink()  # a memory map of the old file must not see the change
    path.write_bytes(bytes(data[: {"cut": len(data) - 5, "empty": 0}.get(damage, len(data))]))
    with pytest.warns(UserWarning, match="damaged; they are computed again"):
        assert torch.equal(store.get(KEY, compute), torch.ones(4, 3))
    assert compute.calls == 2
    assert torch.equal(store.get(KEY, compute), torch.ones(4, 3)) and compute.calls == 2


def test_a_failing_computation_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        FeatureStore(tmp_path).get(KEY, fail)
    assert entries(tmp_path) == []
    assert torch.equal(FeatureStore(tmp_path).get(KEY, Counter()), torch.ones(4, 3)), "the lock was released"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to .*VLPROMPT_CACHE"):
        FeatureStore(tmp_path / "file" / "store").get(KEY, Counter())


def test_keys_are_json() -> None:
    with pytest.raises(ConfigError, match="JSON values"):
        FeatureStore("x").path({"a": object()})


@pytest.mark.parametrize("workers", [0, 2])
def test_extract(workers: int, tmp_path: Path, paint: Callable[..., Path], preprocess: Any) -> None:
    samples = [Sample(f"{n}.png", 0, FileSource(str(paint(tmp_path / f"{n}.png", n)))) for n in range(7)]
    transform = clip_transform(preprocess)
    features = extract(lambda images: images.flatten(1) * 2, samples, transform, batch_size=3, workers=workers)
    expected = torch.stack([transform(sample.source.open()).flatten() * 2 for sample in samples])
    assert torch.equal(features, expected) and not features.requires_grad and not features.is_inference()


@pytest.mark.parametrize("workers", [0, 2])
def test_extract_names_a_bad_image_without_a_traceback(workers: int, tmp_path: Path, preprocess: Any) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    samples = [Sample("bad.png", 0, FileSource(str(tmp_path / "bad.png")))]
    with pytest.raises(DataError) as caught:
        extract(lambda images: images.flatten(1), samples, clip_transform(preprocess), workers=workers)
    assert "bad.png cannot be decoded (7 bytes" in str(caught.value) and "Traceback" not in str(caught.value)


def test_extract_nothing(preprocess: Any) -> None:
    with pytest.raises(DataError, match="no images"):
        extract(lambda images: images, [], clip_transform(preprocess))
