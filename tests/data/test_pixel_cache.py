"""The pixel cache: torchvision's pixels, decoded once, in memory that workers share."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from vlprompt._random import derived_seed
from vlprompt.data import test_transform as clip_transform
from vlprompt.data import train_transform
from vlprompt.data.batches import ImageBatches, automatic_workers, labels_of, make_loader
from vlprompt.data.pixel_cache import PixelCache
from vlprompt.data.transforms import Transform
from vlprompt.datasets import FileSource, Sample

SIZES = [(40, 30), (7, 5), (1, 1), (16, 16), (3, 200), (900, 40), (1200, 900)]


def reference(preprocess: Any) -> Any:
    """CoOp's training transform, as in its code."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocess.size, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode(preprocess.interpolation)
            ),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )


def samples(folder: Path, mode: str = "RGB") -> list[Sample]:
    written = []
    for number, (width, height) in enumerate(SIZES):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        path = folder / f"{mode}{number}.png"
        if mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        (image if mode == "RGBA" else image.convert(mode)).save(path)
        written.append(Sample(path.name, 0, FileSource(str(path))))
    return written


def decoded(sample: Sample) -> Image.Image:
    return Image.open(sample.source.path).convert("RGB")  # type: ignore[attr-defined]


def drawn(images: ImageBatches, epoch: int) -> torch.Tensor:
    batch = images.__getitems__([(epoch, index) for index in range(len(images))])
    return images.cache.transform.finish(batch["images"])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_of_cached_images_match_torchvision(
    workers: int, mode: str, interpolation: str, tmp_path: Path, preprocess: Any
) -> None:
    weights = dataclasses.replace(preprocess, interpolation=interpolation)
    cache = PixelCache(samples(tmp_path, mode), train_transform(weights), 10**8, workers)
    images, wanted = ImageBatches(cache, torch.zeros(len(SIZES)), seed=5), reference(weights)
    for epoch in range(6):
        assert cache.kept() == (len(SIZES) if epoch else 0)
        for image, index in zip(drawn(images, epoch), range(len(SIZES)), strict=True):
            torch.manual_seed(derived_seed(5, epoch, index))
            assert torch.equal(image, wanted(decoded(cache.samples[index]))), (epoch, index)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_cached_center_pixels_match_the_image(mode: str, resize_mode: str, tmp_path: Path, preprocess: Any) -> None:
    weights = dataclasses.replace(preprocess, resize_mode=resize_mode)
    # An image of one pixel in height cannot be scaled to the input size without a huge width.
    cache = PixelCache(samples(tmp_path, mode)[:4], clip_transform(weights), 10**7)
    images = ImageBatches(cache, torch.zeros(4))
    ends = transforms.Compose([transforms.ToTensor(), transforms.Normalize(weights.mean, weights.std)])
    for _ in range(2):
        for image, sample in zip(drawn(images, 0), cache.samples, strict=True):
            pixels = clip_transform(weights).pixels(decoded(sample)).transpose(1, 2, 0)
            assert torch.equal(image, ends(Image.fromarray(pixels)))
    assert cache.kept() == 4


class Counted(FileSource):
    """A file that logs every open."""

    def open(self) -> Any:
        with open(Path(self.path).parent / "log", "a") as file:
            file.write(f"{os.getpid()} {self.path}\n")
        return super().open()


def opened(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def counted(tmp_path: Path, paint: Callable[..., Path]) -> list[Sample]:
    return [Sample(f"{n}", 0, Counted(str(paint(tmp_path / f"{n}.png", n, size=(20 + n, 30))))) for n in range(9)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["random", "center"])
def test_each_image_is_decoded_once(
    kind: str, workers: int, counted: list[Sample], tmp_path: Path, preprocess: Any
) -> None:
    cache = PixelCache(counted, Transform(preprocess, kind), 10**6, workers)
    images = ImageBatches(cache, torch.zeros(9), seed=1 if kind == "random" else None)
    keys = [(0, index) for index in range(9)]
    first = [batch["images"] for batch in make_loader(images, keys, 2, workers)]
    again = [batch["images"] for batch in make_loader(images, keys[::-1], 2, workers)]  # other workers read them now
    assert torch.equal(torch.cat(first), torch.cat(again).flip(0))
    lines = opened(tmp_path)
    assert len(lines) == 9 == len({line.split()[1] for line in lines})
    assert len({line.split()[0] for line in lines}) == max(1, workers)


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (767, 0), (768 * 4 + 5, 4), (10**5, 9)])
def test_images_that_do_not_fit_are_decoded_again(
    keep: int, kept: int, counted: list[Sample], tmp_path: Path, preprocess: Any
) -> None:
    cache = PixelCache(counted, clip_transform(preprocess), keep)
    images = ImageBatches(cache, torch.zeros(9))
    assert torch.equal(drawn(images, 0), drawn(images, 0))
    assert cache.kept() == kept and len(opened(tmp_path)) == 18 - kept


def test_reserved_memory_is_not_allocated(counted: list[Sample], preprocess: Any) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

    before = resident()
    cache = PixelCache(counted, train_transform(preprocess), 2**30, 2)
    cache.pixels(0)
    assert cache.kept() == 1 and resident() - before < 2**24


def test_without_memory_nothing_is_cached(
    counted: list[Sample], preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlprompt.data.pixel_cache.free_memory", lambda: 100)
    cache = PixelCache(counted, clip_transform(preprocess), 10**6)
    cache.pixels(0)
    assert cache.kept() == 0

    def refuse(*_: Any) -> Any:
        raise OSError("no memory")

    monkeypatch.setattr("vlprompt.data.pixel_cache.free_memory", lambda: 10**9)
    monkeypatch.setattr("vlprompt.data.pixel_cache.mmap.mmap", refuse)
    cache = PixelCache(counted, clip_transform(preprocess), 10**6, 2)
    assert cache.pixels(0).shape == (3, 16, 16) and cache.kept() == 0


def test_a_copy_for_a_spawned_worker_caches_nothing(counted: list[Sample], preprocess: Any) -> None:
    cache = PixelCache(counted, clip_transform(preprocess), 10**6)
    expected = cache.pixels(0)
    twin = copy.copy(cache)  # copies the state that a pickle for a worker has
    assert np.array_equal(twin.pixels(0), expected) and (cache.kept(), twin.kept()) == (1, 0)


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (0, 3, 16, 16)])
def test_finishing_a_batch_is_to_tensor_and_normalize(shape: tuple[int, ...], preprocess: Any) -> None:
    transform = Transform(dataclasses.replace(preprocess, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)), "center")
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    got = transform.finish(pixels)
    assert got.dtype == torch.float32 and got.shape == shape and got.is_contiguous()
    ends = transforms.Compose([transforms.ToTensor(), transforms.Normalize(transform.mean, transform.std)])
    for image, raw in zip(got, pixels, strict=True):
        assert torch.equal(image, ends(Image.fromarray(raw.permute(1, 2, 0).numpy())))


def test_automatic_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert [automatic_workers(images) for images in (0, 255, 256, 10**6)] == [0, 0, 8, 8]
    assert [automatic_workers(1000, processes) for processes in (2, 4, 24)] == [6, 3, 0]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert automatic_workers(1000) == 3


def test_labels() -> None:
    multi: Any = [Sample("a", label, FileSource("a")) for label in ((0, 2), (), 1)]  # type: ignore[arg-type]
    assert labels_of(multi, 3, True).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert labels_of(multi, 3, True).dtype == torch.float32
    single = labels_of([Sample("a", label, FileSource("a")) for label in (2, 0)], 3, False)
    assert single.tolist() == [2, 0] and single.dtype == torch.int64
