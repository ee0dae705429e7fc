"""``vlprompt data check``: all problems in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprompt.datasets.acquire.check import check
from vlprompt.datasets.card import Card
from vlprompt.datasets.card_files import read_card

NAMES = ("cat", "dog", "eel")
CARD = """\
schema: 1
name: toy
task: multiclass
folders: [toy]
reader: split_json
reader_options: {split_file: split.json, image_dir: images}
splits: {coop: {train: 48, val: 3, test: 6}}
classes: {count: 3, names_from: split, names: [cat, dog, eel]}
templates: {single: "a photo of a {}."}
metric: accuracy
"""


@pytest.fixture
def card(tmp_path: Path) -> Card:
    (tmp_path / "toy.yaml").write_text(CARD)
    return read_card(tmp_path / "toy.yaml")


@pytest.fixture
def root(tmp_path: Path, paint: Callable[..., Path]) -> Path:
    """A good data set: 16 training, 1 validation and 2 test images of each class, JPEG and PNG."""
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        for number in range(19):
            split_name = "train" if number < 16 else "val" if number == 16 else "test"
            path = f"{name}/{number}.{'jpg' if number % 2 else 'png'}"
            paint(tmp_path / "toy" / "images" / path, label * 20 + number)
            split[split_name].append([path, label, name])
    (tmp_path / "toy" / "split.json").write_text(json.dumps(split))
    return tmp_path


def edit(root: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    path = root / "toy" / "split.json"
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))


def problems_of(card: Card, root: Path, **settings: bool) -> list[str]:
    return [str(problem) for problem in check(card, root, **settings).problems]


def test_a_good_data_set(card: Card, root: Path) -> None:
    checked = check(card, root, decode=True, hash_images=True, strict=True)
    assert not checked.problems and not checked.failed
    assert {key: checked.facts[key] for key in ("classes", "train", "val", "test")} == {
        "classes": 3,
        "train": 48,
        "val": 3,
        "test": 6,
    }


def test_all_problems_in_one_run(card: Card, root: Path) -> None:
    images = root / "toy" / "images"
    for name in ("cat/1.jpg", "dog/2.png", "eel/17.jpg"):
        (images / name).unlink()
    whole = (images / "cat" / "3.jpg").read_bytes()
    (images / "cat" / "3.jpg").write_bytes(whole[: len(whole) // 2])

    def change(split: dict[str, list[Any]]) -> None:
        split["train"][0][0] = "../outside.png"
        split["test"].append(list(split["train"][5]))
        for items in split.values():
            for item in items:
                item[1] += item[1] == 2  # label 2 becomes 3: a gap

    edit(root, change)
    text = "\n".join(problems_of(card, root))
    for piece in (
        'S04 train[0]: path "../outside.png" leaves the image folder',
        "S07 label 2 never occurs (0..3 expected)",
        "S11 cat/5.jpg is in train and in test",
        "S15 cat/1.jpg is missing",
        "S15 dog/2.png is missing",
        "S15 eel/17.jpg is missing",
        "S16 cat/3.jpg: Image ",
    ):
        assert piece in text, text


def test_truncated_files_are_found_without_decoding_all(card: Card, root: Path) -> None:
    images = root / "toy" / "images"
    (images / "dog" / "4.png").write_bytes((images / "dog" / "4.png").read_bytes()[:60])
    (images / "dog" / "6.png").write_bytes(b"")
    # Bytes after the end mark are not damage: some cameras append them.
    whole = (images / "cat" / "5.jpg").read_bytes()
    (images / "cat" / "5.jpg").write_bytes(whole + b"\0" * 40)
    assert [text[:14] for text in problems_of(card, root)] == ["S16 dog/4.png:", "S16 dog/6.png:"]


def test_decoding_finds_small_and_damaged_images(card: Card, root: Path, paint: Callable[..., Path]) -> None:
    paint(root / "toy" / "images" / "eel" / "0.png", size=(7, 30))
    assert problems_of(card, root) == []
    assert problems_of(card, root, decode=True) == ["S16 eel/0.png: 7 x 30 pixels; both sides need 8"]


def test_the_same_file_in_train_and_test(card: Card, root: Path) -> None:
    images = root / "toy" / "images"
    (images / "cat" / "18.png").write_bytes((images / "cat" / "2.png").read_bytes())
    assert problems_of(card, root) == []
    assert problems_of(card, root, hash_images=True) == ["S12 cat/18.png (test) and cat/2.png are the same file"]


def test_sizes_names_and_balance(card: Card, root: Path) -> None:
    edit(root, lambda split: split["train"].pop(0))
    checked = check(card, root)
    assert not checked.failed and [problem.code for problem in checked.problems] == ["S13", "S17"]
    assert "train has 47 images, the card states 48" in checked.problems[0].text
    assert check(card, root, strict=True).failed
    edit(
        root,
        lambda split: [item.__setitem__(2, "tom/cat") for items in split.values() for item in items if item[1] == 0],
    )
    text = "\n".join(problems_of(card, root))
    assert "S20 label 0 is 'tom/cat'; the card states 'cat'" in text
    assert "S19 class name 'tom/cat' has a path separator" in text


def test_a_missing_data_set(card: Card, tmp_path: Path) -> None:
    checked = check(card, tmp_path / "nowhere")
    assert checked.failed and checked.problems[0].code == "S15" and "is not there" in checked.problems[0].text


def test_images_in_other_folders(card: Card, root: Path) -> None:
    (root / "toy" / "images" / "all").mkdir()
    for name in NAMES:
        (root / "toy" / "images" / name).rename(root / "toy" / "images" / "all" / name)
    checked = check(card, root)
    assert len(checked.problems) == 57 and "index_by: basename" in checked.remedy
    (root / "by_name.yaml").write_text(CARD.replace("image_dir: images", "image_dir: images, index_by: basename"))
    text = "\n".join(problems_of(read_card(root / "by_name.yaml"), root))
    assert "S15 0.png exists twice: all/cat/0.png and all/dog/0.png" in text  # the file names are ambiguous


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_images_are_reported_without_a_crash(card: Card, root: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["cat/1.jpg", "dog/2.png"]))
    path = root / "toy" / "images" / name
    whole = path.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    try:
        problems = check(card, root, decode=True).problems
        assert all(problem.code == "S16" and name in problem.text for problem in problems)
        if not damaged:
            assert problems
    finally:
        path.write_bytes(whole)
