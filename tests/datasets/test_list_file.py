"""Image lists: text lines, one file per class, COCO annotations, JSON lines; and their problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.options import ListFileOptions
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.records import SplitLists
from vlprompt.errors import DataError

NAMES = ("cat", "sea lion")


def card(options: ListFileOptions, **fields: Any) -> Card:
    classes = Classes(2, "list", NAMES)
    return Card("toy", "list_file", options, classes, Templates("a {}."), folders=("toy",), notes="Fetch it.", **fields)


@pytest.fixture
def base(tmp_path: Path, paint: Callable[..., Path]) -> Path:
    for number in range(6):
        paint(tmp_path / "toy" / "images" / f"{number}.png", number)
    return tmp_path / "toy"


def write(base: Path, **lists: str) -> None:
    for name, text in lists.items():
        (base / f"{name}.txt").write_text(text)


NUMBERS = ListFileOptions({"train": ("train.txt",), "test": ("test.txt",)}, "images", first_label=1)
BY_NAME = ListFileOptions({"train": ("train.txt",), "test": ("test.txt",)}, "images", label="name", suffix=".png")


def rows(lists: SplitLists, split: str) -> list[tuple[str, Any]]:
    return [(sample.id, sample.label) for sample in getattr(lists, split)]


def test_numbers_and_names(base: Path) -> None:
    write(base, train="0.png 2\n\n1.png 1\n", test="5.png 1\n")
    lists = read_dataset(card(NUMBERS), base.parent)
    assert rows(lists, "train") == [("0.png", 1), ("1.png", 0)] and rows(lists, "test") == [("5.png", 0)]
    assert not lists.val and lists.class_names == list(NAMES)
    write(base, train="0 sea lion\n1 cat\n", test="5 cat\n")
    lists = read_dataset(card(BY_NAME), base.parent)
    assert rows(lists, "train") == [("0.png", 1), ("1.png", 0)]


def test_excluded_images_and_domains(base: Path, paint: Callable[..., Path]) -> None:
    options = ListFileOptions({"train": ("{domain}.txt",), "test": ("{domain}.txt",)}, "images")
    write(base, A="0.png 0\n1.png 1\n", B="2.png 0\n3.png 1\n")
    fields: dict[str, Any] = {"domains": {"a": "A", "b": "B"}, "same_images": True, "excluded": ("1.png",)}
    lists = read_dataset(card(options, **fields), base.parent)
    assert [(s.id, s.domain) for s in lists.test] == [("0.png", "a"), ("2.png", "b"), ("3.png", "b")]


def test_all_bad_lines_are_reported(base: Path) -> None:
    train = "0.png 3\n1.png one\n../x.png 1\n2.png\n0.png 1\n4.png 1\n4.png 2\n9.png 2\n"
    write(base, train=train, test="4.png 1\n")
    with pytest.raises(DataError) as caught:
        read_dataset(card(NUMBERS), base.parent)
    for piece in (
        "S06 train.txt:1: label 3 is out of range; 1 to 2 are expected",
        "S06 train.txt:2: label 'one'",
        'S04 train.txt:3: path "../x.png" leaves the image folder',
        "S03 train.txt:4: expected an image, a space and its number",
        "S11 4.png is twice in train",
        "S11 4.png is in train and in test",
        "S15 9.png is missing",
    ):
        assert piece in str(caught.value)


def test_unknown_names_and_names_without_images(base: Path) -> None:
    write(base, train="0 cats\n1 cat\n", test="2 sea lion\n")
    with pytest.raises(
        DataError, match="S20 train.txt:1: unknown class 'cats'. Did you mean 'cat'(.|\n)*'sea lion' has no"
    ):
        read_dataset(card(BY_NAME), base.parent)
    (base / "train.txt").unlink()
    with pytest.raises(DataError, match="train.txt .does not exist."):
        read_dataset(card(BY_NAME), base.parent)


def test_a_file_per_class(base: Path) -> None:
    """Only 1 counts; difficult (0) and absent (-1) objects do not. The number of blanks varies."""
    options = ListFileOptions(
        {"train": ("{class}_train.txt",), "test": ("{class}_test.txt",)}, "images", format="per_class", suffix=".png"
    )
    write(base, cat_train="0  1\n1 -1\n2  0\n", cat_test="3  1\n4 -1\n")
    (base / "sea lion_train.txt").write_text("0  1\n1  1\n2 -1\n")
    (base / "sea lion_test.txt").write_text("3 -1\n4 -1\n")
    many = card(options, task="multilabel", metric="map")
    lists = read_dataset(many, base.parent)
    assert rows(lists, "train") == [("0.png", (0, 1)), ("1.png", (1,)), ("2.png", ())]
    assert rows(lists, "test") == [("3.png", (0,)), ("4.png", ())]
    write(base, cat_train="0 2\n")
    with pytest.raises(DataError, match="S03 cat_train.txt:1: expected an image and 1, 0 or -1"):
        read_dataset(many, base.parent)


def coco(images: dict[int, str], boxes: list[tuple[int, int]]) -> str:
    return json.dumps(
        {
            "categories": [{"id": 17, "name": "sea lion"}, {"id": 90, "name": "cat"}],
            "images": [{"id": number, "file_name": name} for number, name in images.items()],
            "annotations": [{"image_id": image, "category_id": category} for image, category in boxes],
        }
    )


def test_coco_annotations(base: Path) -> None:
    (base / "images").rename(base / "train")
    (base / "val").mkdir()
    (base / "train" / "5.png").rename(base / "val" / "5.png")
    splits = {"train": ("train.json",), "test": ("val.json",)}
    options = ListFileOptions(splits, format="coco", folders={"train": "train", "test": "val"})
    (base / "train.json").write_text(coco({1: "0.png", 2: "1.png"}, [(1, 17), (1, 90), (1, 17)]))
    (base / "val.json").write_text(coco({7: "5.png"}, [(7, 90)]))
    many = card(options, task="multilabel", metric="map")
    lists = read_dataset(many, base.parent)
    assert rows(lists, "train") == [("train/0.png", (0, 1)), ("train/1.png", ())]
    assert rows(lists, "test") == [("val/5.png", (0,))]
    (base / "val.json").write_text(coco({7: "5.png"}, [(8, 90)]))
    with pytest.raises(DataError, match="an annotation of image 8 and category 90, one of which is unknown"):
        read_dataset(many, base.parent)
    (base / "val.json").write_text('{"images": 3}')
    with pytest.raises(DataError, match="does not hold COCO's instance annotations"):
        read_dataset(many, base.parent)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"images": [{"id": 1, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}]},
            "id .1. of images is given twice",
        ),
        ({"categories": [{"id": 17, "name": "cat"}, {"id": 17, "name": "sea lion"}]}, "of categories is given twice"),
        ({"images": [{"id": 1, "file_name": 7}]}, "image .1.: path 7 is not text"),
        ({"images": [{"id": 1, "file_name": "../0.png"}]}, "leaves the image folder"),
        ({"annotations": [{"image_id": [1], "category_id": 17}]}, "does not hold COCO's instance annotations"),
    ],
)
def test_coco_ids_and_names_are_checked(base: Path, change: dict[str, Any], match: str) -> None:
    content = json.loads(coco({1: "0.png", 2: "1.png"}, [(1, 17)])) | change
    (base / "train.json").write_text(json.dumps(content))
    (base / "val.json").write_text(coco({7: "5.png"}, [(7, 90)]))
    options = ListFileOptions({"train": ("train.json",), "test": ("val.json",)}, "images", format="coco")
    with pytest.raises(DataError, match=match):
        read_dataset(card(options, task="multilabel", metric="map"), base.parent)


def test_json_lines(base: Path) -> None:
    splits = {"train": ("train.txt",), "test": ("test.txt",)}
    options = ListFileOptions(splits, "images", format="jsonl", image_key="img")
    write(
        base,
        train='{"img": "0.png", "label": 1, "text": "a"}\n{"img": "1.png", "label": 0}\n',
        test='{"img": "2.png", "label": 0}',
    )
    assert rows(read_dataset(card(options), base.parent), "train") == [("0.png", 1), ("1.png", 0)]
    write(base, test='{"img": "2.png", "label": true}\n{"img": 2, "label": 0}\n[]\nx\n{"img": "3.png", "label": 0}')
    with pytest.raises(DataError) as caught:
        read_dataset(card(options), base.parent)
    for piece in ("S06 test.txt:1: label 'True'", "S03 test.txt:2", "S03 test.txt:3", "S03 test.txt:4: not valid JSON"):
        assert piece in str(caught.value)


OPTIONS = [
    NUMBERS,
    BY_NAME,
    ListFileOptions(NUMBERS.splits, "images", format="jsonl"),
    ListFileOptions(NUMBERS.splits, "images", format="coco"),
    ListFileOptions(NUMBERS.splits, "images", format="per_class"),
]


@given(st.sampled_from(OPTIONS), st.text(max_size=50), st.text(max_size=20))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_lists_give_our_error_only(base: Path, options: ListFileOptions, train: str, test: str) -> None:
    for name, text in (("train", train), ("test", test)):
        (base / f"{name}.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError):
        read_dataset(card(options), base.parent)


@pytest.mark.parametrize("value", [[1], {"a": 1}, None, 10**30])
def test_ids_and_labels_of_any_json_value(base: Path, value: Any) -> None:
    many = card(ListFileOptions(NUMBERS.splits, "images", format="coco"), task="multilabel", metric="map")
    good = json.loads(coco({1: "0.png"}, [(1, 17)]))
    for part in ("images", "annotations", "categories"):
        for key in good[part][0]:
            text = json.dumps({**good, part: [{**good[part][0], key: value}]})
            write(base, train=text, test=text)
            with pytest.raises(DataError, match="S0|S15|S20"):
                read_dataset(many, base.parent)
    named = card(ListFileOptions(NUMBERS.splits, "images", format="jsonl", label="name"))
    write(base, train=json.dumps({"path": "0.png", "label": value}), test='{"path": "2.png", "label": "cat"}')
    with pytest.raises(DataError, match="train.txt:1: unknown class"):
        read_dataset(named, base.parent)
