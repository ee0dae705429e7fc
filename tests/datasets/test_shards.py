"""Shards: webdataset tar files and Hugging Face's parquet files."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pickle  # noqa: TID251  (sources are sent to workers)
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets.layouts import Expected, encoded, write_layout
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.options import ShardOptions
from vlprompt.datasets.readers import parquet as parquet_module
from vlprompt.datasets.readers import read_dataset, shards
from vlprompt.datasets.records import Sample, SplitLists
from vlprompt.errors import DataError

NAMES = ("cat", "dog", "eel")
FOLDERS = {"train": ("train",), "test": ("test",)}
Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield tmp_path / "cache" / "shards"


def a_card(names: tuple[str, ...] = NAMES, **options: Any) -> Card:
    classes = Classes(len(names), "list", names) if names else Classes(3)
    multilabel = options.pop("multilabel", False)
    shard_options = ShardOptions(**{"splits": FOLDERS, **options})
    several: dict[str, Any] = {"task": "multilabel", "metric": "map"} if multilabel else {}
    return Card("toy", "shards", shard_options, classes, Templates("{}"), folders=("toy",), notes="Do so.", **several)


def built(tmp_path: Path, **options: Any) -> tuple[Expected, SplitLists]:
    expected = write_layout(a_card(**options), tmp_path, per_class=(3, 1, 2))
    return expected, read_dataset(expected.card, tmp_path)


def tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def good(count: int = 3, first: int = 0) -> Members:
    return [
        member
        for number in range(first, first + count)
        for member in ((f"s{number}.png", encoded(".png", number)), (f"s{number}.cls", str(number % 3).encode()))
    ]


def by_hand(root: Path, train: Members, test: Members | None = None) -> Card:
    for split, members in {"train": train, "test": good(first=50) if test is None else test}.items():
        tar(root / "toy" / split / "0.tar", members)
        (root / "toy" / split / "nshards.txt").write_text("1")
    return a_card()


def refused(card: Card, root: Path, *matches: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(card, root)
    assert all(match in str(caught.value) for match in matches), str(caught.value)


# -- webdataset -------------------------------------------------------------------------------------------------------
def test_shards_are_read_in_order(tmp_path: Path) -> None:
    expected, lists = built(tmp_path)
    assert [sample.id for sample in lists.train] == [f"train:s{number:07d}" for number in range(9)]
    assert [sample.label for sample in lists.train] == [0, 1, 2] * 3
    assert {split: len(getattr(lists, split)) for split in ("train", "val", "test")} == expected.counts
    for number, sample in enumerate(lists.train):
        from PIL import Image

        with Image.open(io.BytesIO(encoded(".webp", number))) as image:
            assert sample.source.open().tobytes() == image.convert("RGB").tobytes()


def test_class_names_next_to_the_shards(tmp_path: Path) -> None:
    assert len(built(tmp_path, names=())[1].class_names) == 3
    (tmp_path / "toy" / "classnames.txt").write_text("cat\ndog\neel\n\n\n")
    assert read_dataset(a_card(()), tmp_path).class_names == ["cat", "dog", "eel"]
    (tmp_path / "toy" / "classnames.txt").write_text("cat\n\neel\n")  # an empty line does not shift the names
    refused(a_card(()), tmp_path, "S09 classnames.txt: label 1: the class name is empty")
    (tmp_path / "toy" / "classnames.txt").unlink()
    refused(a_card(()), tmp_path, "S20 there are no class names")


def test_several_labels(tmp_path: Path) -> None:
    card = dataclasses.replace(by_hand(tmp_path, []), task="multilabel", metric="map")

    def vectors(*rows: list[Any]) -> Members:
        members: Members = []
        for number, row in enumerate(rows):
            stream = io.BytesIO()
            np.save(stream, np.array(row))
            members += [(f"{number}.jpg", encoded(".jpg")), (f"{number}.npy", stream.getvalue())]
        return members

    tar(tmp_path / "toy" / "train" / "0.tar", vectors([1, 0, 1], [0.0, 1.0, 0.0], [0, 0, 0], [True, True, True]))
    tar(tmp_path / "toy" / "test" / "0.tar", vectors([1, 0, 0]))
    lists = read_dataset(card, tmp_path)
    assert [sample.label for sample in lists.train] == [(0, 2), (1,), (), (0, 1, 2)]
    assert read_dataset(card, tmp_path) == lists  # and the same from the index
    tar(tmp_path / "toy" / "test" / "0.tar", vectors([1, 0]))
    refused(card, tmp_path, "S06 test: a label vector has 2 values; there are 3 classes")
    tar(tmp_path / "toy" / "test" / "0.tar", vectors([1, 0, 2]))
    refused(card, tmp_path, "0.npy is not a NumPy file of one row of 0 and 1")


def test_numpy_files_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)})
    for data in (stream.getvalue(), huge.getvalue(), b"\x93NUMPY", b""):
        card = by_hand(tmp_path, [("0.jpg", encoded(".jpg")), ("0.npy", data)])
        refused(card, tmp_path, "0.npy is not a NumPy file")
    assert not (tmp_path / "exploded").exists()


def test_the_index_avoids_a_second_pass(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = by_hand(tmp_path, good())
    before = {path.name for path in (tmp_path / "toy").rglob("*")}
    lists = read_dataset(card, tmp_path)
    assert {path.name for path in (tmp_path / "toy").rglob("*")} == before and len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a second pass"))
        assert read_dataset(card, tmp_path) == lists
        assert lists.test[0].source.open().mode == "RGB"
    # A shard that changed is read again.
    path = tmp_path / "toy" / "train" / "0.tar"
    stamp = lists.train[0].source.stamp()
    tar(path, good(6))
    assert len(read_dataset(card, tmp_path).train) == 6 and lists.train[0].source.stamp() != stamp


ENTRIES = (
    "[0, 1, 2]", '[7, 0, 9, "a", 0]', '[0, -1, 9, "a", 0]', '[0, 1, 9, "../a", 0]', '[0, 1, 9, "a", true]', "0", "{}",
)  # fmt: skip
NONE_PASSED = '"passed": {"kinds": {}, "litter": 0}'
DAMAGED = [f'{{"schema": 2, "entries": [{entry}], "widths": [], {NONE_PASSED}}}' for entry in ENTRIES]
DAMAGED += [
    f'{{"schema": 2, "entries": [], "widths": [], "passed": {passed}}}'
    for passed in (
        "null",
        "[]",
        '{"kinds": {}}',
        '{"kinds": {".x": 1}, "litter": 0}',
        '{"kinds": {".x": [1, 2]}, "litter": 0}',
    )
]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 2}', DAMAGED[0].replace("2", "1", 1), *DAMAGED])
def test_a_damaged_index_is_replaced(damage: str, tmp_path: Path, cache: Path) -> None:
    card = by_hand(tmp_path, good())
    lists = read_dataset(card, tmp_path)
    sound = {path: path.read_bytes() for path in cache.iterdir()}
    for path in sound:
        path.write_text(damage)
    assert read_dataset(card, tmp_path) == lists
    assert {path: path.read_bytes() for path in cache.iterdir()} == sound


def test_an_index_that_cannot_be_stored_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be stored(.|\n)*VLPROMPT_CACHE"):
        assert len(read_dataset(by_hand(tmp_path, good()), tmp_path).train) == 3


def pixels(sample: Sample) -> bytes:
    return sample.source.open().tobytes()


def test_sources_work_in_other_processes(tmp_path: Path) -> None:
    lists = built(tmp_path)[1]
    assert pickle.loads(pickle.dumps(lists.train)) == lists.train
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(pixels, lists.train) == [pixels(sample) for sample in lists.train]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    train = [
        *good(), ("a.png", encoded(".png")), ("b.cls", b"0"), ("../c.png", b""), ("/d.png", b""), ("e.png", b"x"),
        ("e.cls", b"one"), ("f.png", b"x"), ("f.cls", b"3"), ("s0.png", b"again"), ("notes.txt", b"read me"),
    ]  # fmt: skip
    card = by_hand(tmp_path, train)
    (tmp_path / "toy" / "test" / "nshards.txt").write_text("3\n")
    refused(
        card, tmp_path, "S03 train/0.tar: a has no label", "b has no image", 'S04 train/0.tar: path "../c.png" leaves',
        'path "/d.png" is absolute', "S06 train/0.tar: e.cls holds 'one'", "S06 train:f: label 3; 0 to 2",
        "S11 train/0.tar: s0 occurs twice", "S15 shard test/1.tar is missing", "S15 shard test/2.tar is missing",
    )  # fmt: skip


def test_labels_and_keys_over_all_shards(tmp_path: Path) -> None:
    card = by_hand(tmp_path, good(2))
    refused(card, tmp_path, "S07 class 'eel' has no training image")
    tar(tmp_path / "toy" / "train" / "1.tar", good(3))
    (tmp_path / "toy" / "train" / "nshards.txt").write_text("2")
    refused(card, tmp_path, "S11 s0 is twice in train: in 0.tar and 1.tar")
    refused(by_hand(tmp_path, good(), []), tmp_path, "S02 the shards of test (test) contain no images")


def test_validation_may_share_the_test_shards(tmp_path: Path) -> None:
    by_hand(tmp_path, good())
    lists = read_dataset(a_card(splits={**FOLDERS, "val": ("test",)}), tmp_path)
    assert lists.val == lists.test and not lists.sample_val
    refused(a_card(splits={"train": ("train",), "test": ("train",)}), tmp_path, "S11 train:s0 is in train and in test")


def test_links_and_compressed_or_truncated_shards(tmp_path: Path) -> None:
    card = by_hand(tmp_path, good())
    path = tmp_path / "toy" / "train" / "0.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    refused(card, tmp_path, "S04 train/0.tar: 'a.png' is a link, a device or sparse")
    tar(path, good())
    path.write_bytes(path.read_bytes()[:1600])
    refused(card, tmp_path, "S01")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    refused(card, tmp_path, "S01 shard train/0.tar cannot be read as a plain tar file")


def test_missing_files(tmp_path: Path) -> None:
    refused(a_card(), tmp_path, "toy (does not exist)", "Do so.")
    card = by_hand(tmp_path, good())
    for text in ("many", "-1", "0", "999999999", ""):
        (tmp_path / "toy" / "train" / "nshards.txt").write_text(text)
        refused(card, tmp_path, f"train/nshards.txt holds {text!r}; the number of shards is expected")
    (tmp_path / "toy" / "train" / "nshards.txt").unlink()
    refused(card, tmp_path, "nshards.txt (does not exist", "Do so.")


def test_a_shard_that_changes_after_reading(tmp_path: Path) -> None:
    lists = read_dataset(by_hand(tmp_path, good()), tmp_path)
    path = tmp_path / "toy" / "train" / "0.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"0.tar:s0 cannot be read: the shard is truncated"):
        lists.train[0].source.open()
    path.unlink()
    with pytest.raises(DataError, match="0.tar:s0 cannot be read"):
        lists.train[0].source.open()
    with pytest.raises(DataError, match="0.tar cannot be read"):
        lists.train[0].source.stamp()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 2600), st.integers(0, 255)), max_size=8), cut=st.integers(0, 10240))
def test_damaged_shards_raise_data_errors(places: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    card = by_hand(tmp_path, good())
    path = tmp_path / "toy" / "train" / "0.tar"
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[place] = value
    path.write_bytes(data[:cut] if cut < 4000 else data)
    try:
        lists = read_dataset(card, tmp_path)
        for sample in lists.train:
            sample.source.open()
    except DataError as error:
        assert "toy" in str(error)
    else:
        assert {sample.label for sample in lists.train} == {0, 1, 2}


# -- parquet ----------------------------------------------------------------------------------------------------------
PARQUET = {"format": "parquet", "splits": {"train": ("data/train-*.parquet",), "test": ("data/test-*.parquet",)}}


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    refused(a_card(**PARQUET), tmp_path, "Reading toy needs pyarrow", "pip install pyarrow")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow  # noqa: F401

    expected, lists = built(tmp_path, names=(), **PARQUET)
    assert lists.class_names == expected.class_names  # of the ClassLabel feature
    assert [sample.id for sample in lists.train] == [f"train:{number}" for number in range(9)]
    assert [sample.label for sample in lists.test] == [0, 1, 2, 0, 1, 2]
    from PIL import Image

    for number, sample in enumerate(lists.train):
        with Image.open(io.BytesIO(encoded(".png", number))) as image:
            assert pixels(sample) == image.convert("RGB").tobytes()
    assert len({sample.source.stamp() for sample in lists.train}) == 9
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(pixels, lists.train[:3]) == [pixels(sample) for sample in lists.train[:3]]
    # A second file continues the row numbers.
    data = tmp_path / "toy" / "data"
    (data / "train-00001-of-00001.parquet").write_bytes((data / "train-00000-of-00001.parquet").read_bytes())
    assert [sample.id for sample in read_dataset(expected.card, tmp_path).train][9:11] == ["train:9", "train:10"]


def test_parquet_with_several_labels(tmp_path: Path) -> None:
    import pyarrow  # noqa: F401

    expected, lists = built(tmp_path, names=(), multilabel=True, **PARQUET)
    assert lists.class_names == expected.class_names and [sample.label for sample in lists.test[:2]] == [(0,), (1,)]


def test_refused_parquet_files(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    built(tmp_path, **PARQUET)
    path = tmp_path / "toy" / "data" / "train-00000-of-00001.parquet"
    card = a_card(**PARQUET)

    def write(images: Any, labels: Any, **columns: Any) -> None:
        parquet.write_table(arrow.table({"image": images, "label": labels, **columns}), path)

    image = {"bytes": encoded(".png"), "path": None}
    write([image] * 3, [0, 1, -1])
    refused(card, tmp_path, "S06 data/train-00000-of-00001.parquet: row 2 has label -1")
    write([image] * 3, [0, 1, None])
    refused(card, tmp_path, "row 2 has label None")
    write([image] * 3, [0, 1, 7])
    refused(card, tmp_path, "S06 train:2: label 7; 0 to 2 are expected")
    write(["a.png"] * 3, [0, 1, 2])
    refused(card, tmp_path, "S03", "column 'image' holds string; images are expected")
    refused(a_card(**PARQUET, label_key="fine"), tmp_path, "there is no column 'fine'; there are: image, label")
    path.write_bytes(b"PAR1 no")
    refused(card, tmp_path, "S01 data/train-00000-of-00001.parquet cannot be read as a parquet file")
    write([image, {"bytes": None, "path": "a.png"}, image], [0, 1, 2])
    lists = read_dataset(card, tmp_path)
    with pytest.raises(DataError, match="is not in the file, only its name"):
        lists.train[1].source.open()
    path.unlink()
    refused(card, tmp_path, "train-*.parquet (does not exist)", "Do so.")


def test_the_index_is_json(tmp_path: Path, cache: Path) -> None:
    """The schema number must change with the format."""
    read_dataset(by_hand(tmp_path, good(3)), tmp_path)
    content = [json.loads(path.read_text()) for path in cache.iterdir()]
    assert {tuple(index) for index in content} == {("schema", "entries", "widths", "passed", "sha256")}
    assert shards._SCHEMA == 2 and content[0]["entries"][0][0] == 0 and len(content[0]["entries"][0]) == 5


def test_parquet_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, lists = built(tmp_path, **PARQUET)
    monkeypatch.setattr(parquet_module, "_LARGEST_GROUP", 100)
    parquet_module._group.cache_clear()
    with pytest.raises(DataError, match="group 0 has more than 100 bytes of images"):
        lists.train[0].source.open()
    monkeypatch.setattr(parquet_module, "_MOST_ROWS", 8)
    refused(expected.card, tmp_path, "cannot be read as a parquet file: more than 8 rows in all")


def test_pipes_among_parquet_files_and_patterns_of_folders(tmp_path: Path) -> None:
    expected, _ = built(tmp_path, **PARQUET)
    for path in (tmp_path / "toy" / "data").iterdir():
        path.unlink()
        os.mkfifo(path)
    refused(expected.card, tmp_path, "train-*.parquet (does not exist)")
    for pattern in (".", "", "data", "**", "data/***"):
        splits = {"train": (pattern,), "test": (pattern,)}
        refused(a_card(format="parquet", splits=splits), tmp_path, "(does not exist)")
