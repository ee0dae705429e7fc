"""Class folders as cards describe them: order, domains, names; independent of the file system."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlprompt.datasets import find_card, load_dataset
from vlprompt.datasets.card import imagenet_names
from vlprompt.datasets.readers import read_dataset
from vlprompt.errors import ConfigError, DataError

Paint = Callable[..., Path]


def test_folders_that_are_numbers_are_sorted_by_value(tmp_path: Path, paint: Paint) -> None:
    """Of the folders 0, 1, 2 and 10 the last has label 3, not 2."""
    card = find_card("imagenetv2")
    small = dataclasses.replace(card, classes=dataclasses.replace(card.classes, count=4, names_from="folders"))
    for name in ("10", "2", "0", "1"):
        paint(small.base(tmp_path) / "imagenetv2-matched-frequency-format-val" / name / "a.jpeg")
    lists = read_dataset(dataclasses.replace(small, splits={}), tmp_path)
    assert [(s.id, s.label) for s in lists.test] == [(f"{n}/a.jpeg", i) for i, n in enumerate(("0", "1", "2", "10"))]
    assert not lists.train
    (small.base(tmp_path) / "imagenetv2-matched-frequency-format-val" / "n01440764").mkdir()
    with pytest.raises(DataError, match="class folder n01440764/ is not a number"):
        read_dataset(small, tmp_path)


def imagenet(root: Path, paint: Paint) -> None:
    image = paint(root / "image.jpg")
    for wnid in imagenet_names():
        for place in (f"train/{wnid}/b.JPEG", f"train/{wnid}/a.JPEG", f"val/{wnid}/v.JPEG"):
            target = root / "imagenet" / "images" / place
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(image, target)


def test_imagenet(tmp_path: Path, paint: Paint) -> None:
    imagenet(tmp_path, paint)
    with pytest.warns(UserWarning, match="train has 2,000 images, the card states 1,281,167"):
        task = load_dataset("imagenet", root=tmp_path, shots=1, seed=1, classes="new")
    assert (len(task.class_names), len(task.train), len(task.val), len(task.test)) == (500, 500, 500, 500)
    assert task.all_class_names[0] == "tench" and task.sampler == "sorted-v1"
    images = tmp_path / "imagenet" / "images"
    shutil.rmtree(images / "val" / "n01440764")
    (images / "train" / "n00000001").mkdir()
    paint(images / "train" / "n00000001" / "x.JPEG")
    with pytest.raises(DataError, match="class folder n00000001/ is not expected"):
        load_dataset("imagenet", root=tmp_path)
    shutil.rmtree(images / "val")
    paint(images / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="are not sorted into class folders; expected one folder per class"):
        load_dataset("imagenet", root=tmp_path)
    shutil.rmtree(images / "val")
    with pytest.raises(DataError, match="images/val .does not exist."):
        load_dataset("imagenet", root=tmp_path)


def office_home(root: Path, paint: Paint) -> Path:
    """Write OfficeHome's layout with all its classes under ``root``."""
    card = find_card("office_home")
    image = paint(root / "image.jpg")
    for domain in card.domains:
        for split, count in (("train", 2), ("val", 1)):
            for name in card.classes.keys:
                for number in range(count):
                    target = root / "office_home_dg" / domain / split / name / f"{number}.jpg"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(image, target)
    return root


@pytest.mark.filterwarnings("ignore:.*the card states")
def test_domains_in_folders(tmp_path: Path, paint: Paint) -> None:
    root = office_home(tmp_path, paint)
    everything = load_dataset("office_home", root=root)
    assert not everything.train and len(everything.test) == 4 * 65 * 3  # no test image is trained on
    task = load_dataset("office_home", root=root, shots=-1, source=["art", "clipart"], target=["product"])
    assert {s.domain for s in task.train} == {"art", "clipart"} and {s.domain for s in task.test} == {"product"}
    assert [len(samples) for samples in (task.train, task.val, task.test)] == [260, 130, 195]
    tv = task.class_names.index("tv")
    assert all(s.label == tv for s in task.test if "/TV/" in s.id) and task.class_names[tv + 1] == "table"
    alone = load_dataset("office_home", root=root, target=["product"])
    assert not alone.train and not alone.val and alone.test == task.test  # without a source nothing is trained on
    with pytest.raises(ConfigError, match="195 images of office_home would be both training and test images"):
        load_dataset("office_home", root=root, source=["art"], target=["art"])


@pytest.fixture
def disorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``disorder(seed)`` shuffles directory listings and draws from the global random generator."""
    listdir, scandir, walk = os.listdir, os.scandir, os.walk
    state = random.Random(0)

    def shuffled(entries: Any) -> list[Any]:
        entries = list(entries)
        state.shuffle(entries)
        random.random()
        return entries

    def walked(*arguments: Any, **settings: Any) -> Iterator[Any]:
        for place, folders, files in walk(*arguments, **settings):
            state.shuffle(folders)
            yield place, folders, shuffled(files)

    def start(seed: int) -> None:
        state.seed(seed)
        random.seed(seed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda *a: shuffled(listdir(*a)))
        patch.setattr(os, "scandir", lambda *a: shuffled(scandir(*a)))
        patch.setattr(os, "walk", walked)
        yield start


@pytest.mark.filterwarnings("ignore:.*the card states")
def test_draws_are_independent_of_listing_order_and_other_generators(
    tmp_path: Path, paint: Paint, disorder: Callable[[int], None]
) -> None:
    root = office_home(tmp_path, paint)
    for name in ("b", "a", "c"):
        for number in range(9):
            paint(tmp_path / "mine" / name / f"{number}.png", number)
    for name, place, settings in (
        ("office_home", root, {"source": ["art", "clipart"], "target": ["product"]}),
        ("folder", tmp_path / "mine", {}),
        ("demo", None, {}),
    ):
        draws = set()
        for seed in range(4):
            disorder(seed)
            task = load_dataset(name, root=place, shots=2, seed=7, **settings)  # type: ignore[arg-type]
            draws.add((task.split_sha256, task.shots_sha256, tuple(s.id for s in task.val), tuple(task.class_names)))
        assert len(draws) == 1, name
