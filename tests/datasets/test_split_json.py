"""Split files: one failing file per validation rule, and missing or linked images."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprompt.datasets.card import Card, Classes, Source, Split, Templates
from vlprompt.datasets.options import SplitJsonOptions
from vlprompt.datasets.readers import read_dataset
from vlprompt.errors import DataError

Toy = Callable[..., Path]
TOY_SPLIT: dict[str, list[list[Any]]] = {
    split: [[f"{name}/{n}.png", label, name] for label, name in enumerate(("cat", "dog", "eel")) for n in numbers]
    for split, numbers in (("train", range(4)), ("val", range(4, 5)), ("test", range(5, 7)))
}
TOY_CARD = Card(
    name="toy",
    reader="split_json",
    options=SplitJsonOptions("split.json", "images"),
    classes=Classes(),
    templates=Templates("a photo of a {}."),
    folders=("toy",),
    sources=(Source("images", "toy.example"),),
    notes="Unpack toy.zip into toy/.",
)


def published(**facts: Any) -> Card:
    return dataclasses.replace(TOY_CARD, split="coop", splits={"coop": Split(**facts)})


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
            for number, item in enumerate(item for items in TOY_SPLIT.values() for item in items):
                paint(base / "images" / item[0], number)
        return tmp_path / "root"

    return build


def changed(**splits: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TOY_SPLIT), **splits}


def with_item(split: str, index: int, item: Any) -> dict[str, Any]:
    content: dict[str, Any] = copy.deepcopy(TOY_SPLIT)
    content[split][index] = item
    return content


def relabelled(rule: Callable[[int], int]) -> dict[str, Any]:
    return {split: [[path, rule(label), name] for path, label, name in items] for split, items in TOY_SPLIT.items()}


def test_a_good_file(toy: Toy) -> None:
    lists = read_dataset(TOY_CARD, toy())
    assert lists.class_names == ["cat", "dog", "eel"]
    assert [len(samples) for samples in (lists.train, lists.val, lists.test)] == [12, 3, 6]
    assert lists.train[5].id == "dog/1.png" and lists.train[5].label == 1
    assert lists.train[5].source.open().mode == "RGB"


BAD: dict[str, tuple[Any, str]] = {
    "S01 not UTF-8": (b'{"train": "\xff"}', "not valid JSON"),
    "S01 cut short": (json.dumps(TOY_SPLIT)[:-20], "not valid JSON"),
    "S01 empty": (b"", "not valid JSON"),
    "S01 repeated key": ('{"train": [], "train": []}', "key 'train' is given twice"),
    "S01 not a number": ('{"train": [["a.png", NaN, "a"]], "val": [], "test": []}', "NaN is not JSON"),
    "S01 too deep": ("[" * 100_000, "nested too deeply|not valid JSON"),
    "S02 a list": (b"[1, 2]", "holds a list"),
    "S02 unknown key": (changed(tests=[]), "unknown key 'tests'. Did you mean 'test'"),
    "S02 missing key": ({"train": TOY_SPLIT["train"], "val": []}, "key 'test' is missing"),
    "S02 empty test": (changed(test=[]), "'test' is empty"),
    "S02 not a list": (changed(val={}), "'val' is a dict"),
    "S03 two values": (
        with_item("test", 2, ["dog/5.png", 1]),
        r"test\[2\]: expected \[path, label, class name\], got 2",
    ),
    "S03 no list": (with_item("val", 0, "cat/4.png"), r"val\[0\]: expected .* got a str"),
    "S04 parent": (with_item("train", 3, ["../../etc/x.png", 0, "cat"]), r'train\[3\]: path "../../etc/x.png" leaves'),
    "S04 parent inside": (with_item("train", 3, ["cat/../cat/3.png", 0, "cat"]), "leaves the image folder"),
    "S04 absolute": (with_item("train", 3, ["/etc/passwd", 0, "cat"]), "is absolute"),
    "S04 drive": (with_item("train", 3, ["C:/x.png", 0, "cat"]), "is absolute"),
    "S04 backslash": (with_item("train", 3, ["cat\\3.png", 0, "cat"]), "has a backslash"),
    "S04 NUL": (with_item("train", 3, ["cat/3\0.png", 0, "cat"]), "control characters"),
    "S04 line feed": (with_item("train", 3, ["cat/3\n.png", 0, "cat"]), "control characters"),
    "S04 empty": (with_item("train", 3, ["", 0, "cat"]), "path is empty"),
    "S04 a number": (with_item("train", 3, [7, 0, "cat"]), "path 7 is not text"),
    "S04 long": (with_item("train", 3, ["a" * 2000, 0, "cat"]), "2000 bytes"),
    "S04 surrogate": (with_item("train", 3, ["\ud800.png", 0, "cat"]), "not valid Unicode"),
    "S04 not simple": (with_item("train", 3, ["cat//3.png", 0, "cat"]), "simplest form"),
    "S06 text": (with_item("train", 0, ["cat/0.png", "0", "cat"]), r"train\[0\]: label '0' is a str"),
    "S06 boolean": (with_item("train", 4, ["dog/0.png", True, "dog"]), "label True is a bool"),
    "S06 fraction": (with_item("train", 4, ["dog/0.png", 1.9, "dog"]), "label 1.9 is a float"),
    "S06 negative": (with_item("train", 0, ["cat/0.png", -1, "cat"]), "label -1 is out of range"),
    "S06 huge": (with_item("train", 0, ["cat/0.png", 10**6, "cat"]), "label 1000000 is out of range"),
    "S07 gap": (relabelled(lambda label: label + (label == 2)), "label 2 never occurs"),
    "S07 not in train": (with_item("test", 0, ["cat/5.png", 3, "fox"]), r"label 3 \('fox'\) never occurs in train"),
    "S08 from one": (relabelled(lambda label: label + 1), "subtract 1 from every label"),
    "S09 two names": (with_item("val", 0, ["cat/4.png", 0, "Cat"]), "label 0 is called 'cat' and 'Cat'"),
    "S09 empty name": (with_item("val", 0, ["cat/4.png", 0, " "]), "class name is empty"),
    "S09 long name": (with_item("val", 0, ["cat/4.png", 0, "c" * 201]), "201 characters"),
    "S09 unprintable": (with_item("val", 0, ["cat/4.png", 0, "c\tat"]), "unprintable"),
    "S09 braces": (with_item("val", 0, ["cat/4.png", 0, "{cat}"]), "braces"),
    "S09 not text": (with_item("val", 0, ["cat/4.png", 0, None]), "class name None is not text"),
    "S11 in one split": (with_item("train", 1, ["cat/0.png", 0, "cat"]), "cat/0.png is twice in train"),
    "S11 in two splits": (with_item("test", 0, ["cat/0.png", 0, "cat"]), "cat/0.png is in train and in test"),
    "S15 missing": (with_item("test", 0, ["cat/99.png", 0, "cat"]), "1 of 21 images of toy are missing under"),
}


@pytest.mark.parametrize("rule", sorted(BAD))
def test_each_rule(rule: str, toy: Toy) -> None:
    content, message = BAD[rule]
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(TOY_CARD, toy(content))
    text = str(caught.value)
    assert len(text.splitlines()) <= 26
    assert str(toy(content) / "toy") in text


def test_all_problems_are_listed_up_to_a_limit(toy: Toy) -> None:
    split = changed(train=[[f"../{index}.png", "0", "{}"] for index in range(30)])
    with pytest.raises(DataError) as caught:
        read_dataset(TOY_CARD, toy(split))
    assert "90 problems" in str(caught.value) and "... and 24 more" in str(caught.value)


def test_two_labels_with_the_same_name_warn(toy: Toy) -> None:
    split = {name: [[p, y, "cat" if n == "dog" else n] for p, y, n in items] for name, items in TOY_SPLIT.items()}
    with pytest.warns(UserWarning, match="labels 0 and 1 are both 'cat'"):
        assert read_dataset(TOY_CARD, toy(split)).class_names == ["cat", "cat", "eel"]


def test_all_missing_images_in_one_error(toy: Toy) -> None:
    root = toy()
    shutil.rmtree(root / "toy" / "images" / "dog")
    with pytest.raises(DataError, match="7 of 21 images of toy are missing") as caught:
        read_dataset(TOY_CARD, root)
    assert "dog/0.png" in str(caught.value) and "dog/6.png" in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(toy: Toy, tmp_path: Path, paint: Callable[..., Path]) -> None:
    root = toy()
    outside = paint(tmp_path / "elsewhere" / "0.png")
    target = root / "toy" / "images" / "cat" / "0.png"
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(DataError, match="S05 .cat/0.png.*through a link"):
        read_dataset(TOY_CARD, root)
    shutil.rmtree(root / "toy" / "images" / "dog")
    (root / "toy" / "images" / "dog").symlink_to(outside.parent)
    with pytest.raises(DataError, match="S05 .dog/0.png.*through a link that leaves"):
        read_dataset(TOY_CARD, root)


def test_links_inside_and_a_linked_data_set_are_accepted(toy: Toy, tmp_path: Path) -> None:
    root = toy()
    target = root / "toy" / "images" / "cat" / "0.png"
    target.unlink()
    target.symlink_to("1.png")
    (tmp_path / "other").mkdir()
    os.symlink(root / "toy", tmp_path / "other" / "toy")
    assert len(read_dataset(TOY_CARD, tmp_path / "other").train) == 12


def test_a_missing_split_file_is_not_generated(toy: Toy) -> None:
    root = toy()
    (root / "toy" / "split.json").unlink()
    card = published(file_sha256="ab" * 32, content_sha256="cd" * 32)
    with pytest.raises(DataError, match="it is not generated") as caught:
        read_dataset(card, root)
    text = str(caught.value)
    assert str(root / "toy" / "split.json") in text and "ab" * 32 in text and "cd" * 32 in text
    assert not (root / "toy" / "split.json").exists()


def test_sizes_and_content_that_differ_warn(toy: Toy) -> None:
    root = toy()
    card = published(train=12, val=3, test=7)
    with pytest.warns(UserWarning, match="test has 6 images, the card states 7"):
        read_dataset(card, root)
    card = published(content_sha256="0" * 64, train=12, val=3, test=6)
    with pytest.warns(UserWarning, match="the split differs from the published one"):
        read_dataset(card, root)


def test_wrong_number_of_classes(toy: Toy) -> None:
    with pytest.raises(DataError, match="3 classes; toy has 4"):
        read_dataset(dataclasses.replace(TOY_CARD, classes=Classes(4)), toy())


def test_a_missing_image_folder(toy: Toy) -> None:
    with pytest.raises(DataError, match="image folder is missing"):
        read_dataset(TOY_CARD, toy(images=False))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["train", "val", "test", "x"]), inner),
    max_leaves=12,
)


@given(st.one_of(values.map(json.dumps).map(str.encode), st.binary(max_size=60)))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_files_give_our_error_only(toy: Toy, content: bytes) -> None:
    with pytest.raises(DataError):
        read_dataset(TOY_CARD, toy(content, images=False))
