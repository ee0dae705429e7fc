"""Toy data sets for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from vlprompt.data import FewShotTask, FileSource, Sample, find_card


@dataclass(frozen=True)
class Preprocess:
    size: int = 16
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess()


@pytest.fixture
def paint() -> Callable[..., Path]:
    """``paint(path, value=0, mode="RGB", size=(20, 24))`` writes an image that differs with ``value``."""

    def write(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 24)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", size)
        places = ((x, y) for y in range(size[1]) for x in range(size[0]))
        picture.putdata([((x * 7 + value * 31) % 256, (y * 11 + value) % 256, value % 256) for x, y in places])
        picture.convert(mode).save(path)
        return path

    return write


@pytest.fixture
def toy_task(tmp_path: Path, paint: Callable[..., Path]) -> Callable[[int], FewShotTask]:
    """``toy_task(n)``: two classes with n training, 3 validation and 7 test images."""

    def build(train: int) -> FewShotTask:
        parts = {
            part: [
                Sample(f"{part}/{n}.png", n % 2, FileSource(str(paint(tmp_path / part / f"{n}.png", start + n))))
                for n in range(count)
            ]
            for part, count, start in (("train", train, 0), ("val", 3, 20), ("test", 7, 30))
        }
        names = ["a", "b"]
        return FewShotTask(
            "toy",
            names,
            names,
            "a {}.",
            **parts,
            shots=6,
            seed=1,
            classes="all",
            split_sha256="s",
            shots_sha256="t",
            card=find_card("folder"),
        )

    return build
