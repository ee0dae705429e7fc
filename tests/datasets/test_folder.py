"""A folder of images of the user: both layouts, the automatic split, and refused folders."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprompt.datasets import find_card, load_dataset
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.readers.folder import cut_class
from vlprompt.errors import DataError

FOLDER = find_card("folder")
Paint = Callable[..., Path]


def fill(root: Path, paint: Paint, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            paint(root / name / f"{index}.png", number * 16 + index)
    return root


def test_three_classes_of_five(tmp_path: Path, paint: Paint) -> None:
    task = load_dataset("folder", root=fill(tmp_path, paint, {"my_cat": 5, "Zebra": 5, "ähre": 5}))
    assert task.class_names == ["Zebra", "my_cat", "ähre"]  # UTF-8 bytes: capitals first, accents last
    assert [len(samples) for samples in (task.train, task.val, task.test)] == [6, 3, 6]
    assert task.sampler == "sorted-v1"
    ids = [sample.id for samples in (task.train, task.val, task.test) for sample in samples]
    assert len(set(ids)) == 15 and all(sample.id.startswith("my_cat/") for sample in task.train if sample.label == 1)


@given(st.text("abé_ 1", min_size=1), st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_the_cut(name: str, count: int) -> None:
    files = [f"{index}.jpg" for index in range(count)]
    splits = cut_class(name, files)
    shuffled = files[:]
    random.shuffle(shuffled)
    assert cut_class(name, shuffled) == splits
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(files)
    assert len(splits["train"]) >= 1 and len(splits["test"]) >= 1
    if count >= 5:
        assert (len(splits["train"]), len(splits["val"])) == (round(0.5 * count), round(0.2 * count))


def test_the_cut_is_frozen() -> None:
    assert cut_class("cat", [f"{index}.jpg" for index in range(5)]) == FROZEN


FROZEN = {"train": ["1.jpg", "2.jpg"], "val": ["4.jpg"], "test": ["0.jpg", "3.jpg"]}


def test_the_cut_is_independent_of_other_classes_and_seeds(tmp_path: Path, paint: Paint) -> None:
    first = load_dataset("folder", root=fill(tmp_path / "first", paint, {"b": 9, "c": 9}), seed=1)
    second = load_dataset("folder", root=fill(tmp_path / "second", paint, {"a": 7, "b": 9, "c": 9}), seed=2)
    assert {sample.id for sample in first.test} <= {sample.id for sample in second.test}


def test_a_given_split(tmp_path: Path, paint: Paint) -> None:
    for split, count in (("train", 3), ("test", 2)):
        fill(tmp_path / split, paint, {"b": count, "a": count})
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    lists = read_dataset(FOLDER, tmp_path)
    assert lists.class_names == ["a", "b"] and not lists.val
    assert [sample.id for sample in lists.test] == ["test/a/0.png", "test/a/1.png", "test/b/0.png", "test/b/1.png"]
    fill(tmp_path / "val", paint, {"b": 1})
    assert [(sample.id, sample.label) for sample in read_dataset(FOLDER, tmp_path).val] == [("val/b/0.png", 1)]


def test_train_may_be_a_class(tmp_path: Path, paint: Paint) -> None:
    assert read_dataset(FOLDER, fill(tmp_path, paint, {"bus": 3, "train": 3, "test": 3})).class_names == [
        "bus",
        "test",
        "train",
    ]


def problem(root: Path, match: str) -> str:
    with pytest.raises(DataError, match=match) as caught:
        read_dataset(FOLDER, root)
    assert str(root) in str(caught.value) and len(str(caught.value).splitlines()) < 26
    return str(caught.value)


def test_refused_folders(tmp_path: Path, paint: Paint) -> None:
    problem(tmp_path / "none", "was not found(.|\n)*does not exist(.|\n)*--data.root")
    (tmp_path / "file").write_text("")
    problem(tmp_path / "file", "not a folder")
    (tmp_path / "empty").mkdir()
    problem(tmp_path / "empty", "holds no class folders")
    paint(tmp_path / "loose" / "a.png")
    problem(tmp_path / "loose", "holds 1 image but no class folders")
    text = problem(fill(tmp_path / "short", paint, {"a": 1, "b": 3, "c{}": 3}), "2 problems")
    assert "class 'a' has 1 image" in text and "braces" in text
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    problem(fill(tmp_path / "hollow", paint, {"b": 3}), "a/ holds no images")
    problem(fill(tmp_path / "deep", paint, {"a/x": 3, "b": 3}), r"a/ holds folders \(x/\)")


def test_refused_splits(tmp_path: Path, paint: Paint) -> None:
    root = tmp_path / "cut"
    fill(root / "train", paint, {"a": 2, "b": 2})
    fill(root / "tests", paint, {"a": 2})
    problem(root, "train/ but no test/. Should tests/ be called test/")
    shutil.move(root / "tests", root / "test")
    fill(root / "test", paint, {"bb": 1})
    fill(root / "extra", paint, {"a": 1})
    text = problem(root, "2 problems")
    assert "extra/ is neither" in text and "class 'bb' is not in train/. Did you mean" in text


def test_links_out_of_the_folder_are_refused(tmp_path: Path, paint: Paint) -> None:
    elsewhere = fill(tmp_path / "elsewhere", paint, {"c": 3})
    root = fill(tmp_path / "mine", paint, {"a": 3, "b": 3})
    os.symlink(elsewhere / "c", root / "c")
    problem(root, "c/ is a link to a place outside")
    (root / "c").unlink()
    os.symlink(elsewhere / "c" / "0.png", root / "a" / "9.png")
    problem(root, "a/ has 1 link to places outside")
    (root / "a" / "9.png").unlink()
    os.symlink(root, tmp_path / "link")
    assert len(read_dataset(FOLDER, tmp_path / "link").class_names) == 2
