"""Data sets of the user: a card and a split file for a folder, and a local split for an unavailable split file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.datasets import find_card, list_datasets, load_dataset
from vlprompt.datasets.acquire.user_data import local_split, new_card
from vlprompt.errors import ConfigError, DataError


@pytest.fixture
def image_folder(tmp_path: Path, paint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path / "cards"))
    for name in ("b", "a"):
        for number in range(5):
            paint(tmp_path / "images" / name / f"{number}.png", number)
    return tmp_path / "images"


def test_a_folder_becomes_a_data_set(image_folder: Path) -> None:
    before = sorted(image_folder.rglob("*.png"))
    card_file, split_file, _ = new_card("mine", image_folder, "a drawing of a {}.")
    assert "mine" in list_datasets() and find_card("mine").file == str(card_file)
    task = load_dataset("mine", shots=1)
    assert task.class_names == ["a", "b"] and task.template == "a drawing of a {}."
    assert task.describe()["split_published"] is True  # the card states its hash, so a change is detected
    assert [len(samples) for samples in (task.train, task.val, task.test)] == [2, 2, 4]
    assert split_file.parent == image_folder and sorted(image_folder.rglob("*.png")) == before
    mine, folder = load_dataset("mine", shots=-1), load_dataset("folder", root=image_folder, shots=-1)
    assert [s.id for s in mine.test] == [s.id for s in folder.test]


@pytest.mark.parametrize(
    ("name", "template", "match"),
    [
        ("../x", "{}", "not valid"),
        ("dtd", "{}", "a data set 'dtd' exists"),
        ("Pets", "{}", "a data set 'Pets' exists"),
        ("mine", "a photo", "exactly once"),
    ],
)
def test_refused_names_and_templates(name: str, template: str, match: str, image_folder: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        new_card(name, image_folder, template)
    assert not list(image_folder.glob("*.json"))


def test_nothing_is_overwritten(image_folder: Path) -> None:
    (image_folder / "split_mine.json").write_text("precious")
    with pytest.raises(ConfigError, match="split_mine.json exists"):
        new_card("mine", image_folder)
    assert (image_folder / "split_mine.json").read_text() == "precious"
    with pytest.raises(DataError, match="does not exist"):
        new_card("mine", image_folder / "none")


def test_a_local_split(tmp_path: Path, paint: Callable[..., Path]) -> None:
    card = find_card("dtd")
    for name in ("banded", "blotchy"):
        for number in range(10):
            paint(tmp_path / "dtd" / "images" / name / f"{number}.jpg", number)
    path = local_split(card, tmp_path)
    assert (
        path.name.startswith("split_local_") and not (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").exists()
    )
    assert local_split(card, tmp_path) == path  # the same images give the same split
    content = json.loads(path.read_text())
    assert [len(content[split]) for split in ("train", "val", "test")] == [10, 4, 6]
    task = load_dataset("dtd", root=tmp_path, split=path.name, shots=2)
    assert task.class_names == ["banded", "blotchy"] and len(task.train) == 4
    assert task.describe()["split_published"] is False and task.describe()["split"] == path.name
    with pytest.raises(ConfigError, match="voc2007 does not have"):
        local_split(find_card("voc2007"), tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        local_split(find_card("food101"), tmp_path)
