"""Toy data sets for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlprompt.data.cards import Card


@dataclass(frozen=True)
class Preprocess:
    size: int = 16
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    interpolation: str = "bicubic"


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess()


@pytest.fixture
def paint() -> Callable[..., Path]:
    """``paint(path, value=0, mode="RGB", size=(20, 24))`` writes an image that differs with ``value``."""

    def write(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 24)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", size)
        picture.putdata([((x * 7 + value * 31) % 256, (y * 11 + value) % 256, value % 256) for y in range(size[1]) for x in range(size[0])])
        picture.convert(mode).save(path)
        return path

    return write


TOY_SPLIT: dict[str, list[list[Any]]] = {
    "train": [[f"{name}/{index}.png", label, name] for label, name in enumerate(("cat", "dog", "eel")) for index in range(4)],
    "val": [[f"{name}/{index}.png", label, name] for label, name in enumerate(("cat", "dog", "eel")) for index in (4,)],
    "test": [[f"{name}/{index}.png", label, name] for label, name in enumerate(("cat", "dog", "eel")) for index in (5, 6)],
}
TOY_CARD = Card(
    name="toy", folder="toy", image_dir="images", reader="split_json", template="a photo of a {}.", licence="none",
    home="toy.example", notes="Unpack toy.zip into toy/.", split_file="split.json",
)  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path, paint: Callable[..., Path]) -> Callable[..., Path]:
    """``toy(split)`` writes the toy data set with ``split`` (text, bytes or JSON values) and returns the data root."""

    def build(split: Any = None, images: bool = True) -> Path:
        split = TOY_SPLIT if split is None else split
        base = tmp_path / "root" / "toy"
        base.mkdir(parents=True, exist_ok=True)
        data = split if isinstance(split, bytes) else (split if isinstance(split, str) else json.dumps(split)).encode()
        (base / "split.json").write_bytes(data)
        if images:
            for number, item in enumerate(item for part in TOY_SPLIT.values() for item in part):
                paint(base / "images" / item[0], number)
        return tmp_path / "root"

    return build
