"""A user's own data set: a card and a split file from a folder, and a split that replaces one that cannot be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.datasets import find_card, list_datasets, load_dataset
from vlprompt.datasets.acquire.own import new_card, own_split
from vlprompt.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path: Path, paint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path / "cards"))
    for name in ("b", "a"):
        for number in range(5):
            paint(tmp_path / "pictures" / name / f"{number}.png", number)
    return tmp_path / "pictures"


def test_a_folder_becomes_a_data_set(pictures: Path) -> None:
    before = sorted(pictures.rglob("*.png"))
    card_file, split_file, _ = new_card("mine", pictures, "a drawing of a {}.")
    assert "mine" in list_datasets() and find_card("mine").file == str(card_file)
    task = load_dataset("mine", shots=1)
    assert task.class_names == ["a", "b"] and task.template == "a drawing of a {}."
    assert task.describe()["split_published"] is True  # the card knows its hash: a changed file will be noticed
    assert [len(part) for part in (task.train, task.val, task.test)] == [2, 2, 4]
    assert split_file.parent == pictures and sorted(pictures.rglob("*.png")) == before
    own, folder = load_dataset("mine", shots=-1), load_dataset("folder", root=pictures, shots=-1)
    assert [s.id for s in own.test] == [s.id for s in folder.test]


@pytest.mark.parametrize(
    ("name", "template", "match"),
    [
        ("../x", "{}", "not usable"),
        ("dtd", "{}", "there is a data set 'dtd' already"),
        ("Pets", "{}", "there is a data set 'Pets' already"),
        ("mine", "a photo", "exactly once"),
    ],
)
def test_refused_names_and_templates(name: str, template: str, match: str, pictures: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        new_card(name, pictures, template)
    assert not list(pictures.glob("*.json"))


def test_nothing_is_overwritten(pictures: Path) -> None:
    (pictures / "split_mine.json").write_text("precious")
    with pytest.raises(ConfigError, match="split_mine.json is there already"):
        new_card("mine", pictures)
    assert (pictures / "split_mine.json").read_text() == "precious"
    with pytest.raises(DataError, match="does not exist"):
        new_card("mine", pictures / "none")


def test_a_split_of_ones_own(tmp_path: Path, paint: Callable[..., Path]) -> None:
    card = find_card("dtd")
    for name in ("banded", "blotchy"):
        for number in range(10):
            paint(tmp_path / "dtd" / "images" / name / f"{number}.jpg", number)
    path = own_split(card, tmp_path)
    assert (
        path.name.startswith("split_local_") and not (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").exists()
    )
    assert own_split(card, tmp_path) == path  # the same images give the same split
    content = json.loads(path.read_text())
    assert [len(content[part]) for part in ("train", "val", "test")] == [10, 4, 6]
    task = load_dataset("dtd", root=tmp_path, split=path.name, shots=2)
    assert task.class_names == ["banded", "blotchy"] and len(task.train) == 4
    assert task.describe()["split_published"] is False and task.describe()["split"] == path.name
    with pytest.raises(ConfigError, match="voc2007 does not have"):
        own_split(find_card("voc2007"), tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        own_split(find_card("food101"), tmp_path)
