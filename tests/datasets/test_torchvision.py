"""Torchvision data sets: accepted options, checks, ids, labels and pixels."""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import os
import pickle  # noqa: TID251  (CIFAR's format; sources are sent to workers)
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from tests.datasets.layouts import encoded, write_layout
from vlprompt.datasets.acquire.download import _Job
from vlprompt.datasets.acquire.transfer import Network
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.catalogue import find_card, list_datasets
from vlprompt.datasets.images import stamps_of
from vlprompt.datasets.options import TorchvisionOptions
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.readers import torchvision as reader
from vlprompt.datasets.readers.torchvision_kinds import KINDS
from vlprompt.datasets.records import SplitLists
from vlprompt.errors import DataError

Splits = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # S13: sizes are not the published ones
        yield


def a_card(dataset: str, splits: Splits, names: tuple[str, ...] = (), folder: str = "toy", **fields: Any) -> Card:
    classes = Classes(len(names) or None, "list" if names else "split", names)
    return Card(
        "toy", "torchvision", TorchvisionOptions(dataset, splits), classes, Templates("{}"), folders=(folder,), **fields
    )


def read(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SplitLists:
    return read_dataset(write_layout(find_card(name), root, monkeypatch=monkeypatch, **options).card, root)


def test_ids_labels_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = read("cifar10", tmp_path, monkeypatch, per_class=(3, 0, 2))
    assert [sample.id for sample in lists.train] == [f"train:{index}" for index in range(30)]
    assert [sample.id for sample in lists.test] == [f"test:{index}" for index in range(20)]
    assert [sample.label for sample in lists.train] == list(range(10)) * 3
    assert lists.class_names[1] == "automobile" and lists.sampler == "dassl-v1"
    # The first pixel holds the image's number.
    pixels = [np.asarray(sample.source.open())[0, 0, 0] for sample in lists.train]
    assert pixels == list(range(30))


def test_grey_images_become_rgb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.asarray(read("mnist", tmp_path, monkeypatch).test[3].source.open())
    assert pixels.shape == (28, 28, 3) and (pixels[..., :1] == pixels).all() and pixels[0, 0, 0] == 3


def test_sources_are_opened_once_and_can_be_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = read("mnist", tmp_path, monkeypatch)
    reader._opened.cache_clear()
    opened = reader._opened.cache_info
    copies = [pickle.loads(pickle.dumps(sample.source)) for sample in lists.train]
    assert copies == [sample.source for sample in lists.train]
    assert len({copy.open().tobytes() for copy in copies}) == len(copies) and opened().misses == 1
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(first_pixel, copies) == [first_pixel(copy) for copy in copies]


def first_pixel(source: Any) -> int:
    return int(np.asarray(source.open())[0, 0, 0])


def test_stamps_follow_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = read("mnist", tmp_path, monkeypatch)
    first, second = lists.train[0].source, lists.train[1].source
    before = first.stamp()
    assert before == first.stamp() != second.stamp()
    path = tmp_path / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[16] = 99
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert first.stamp() != before and first_pixel(first) == 99
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        first.open()


# -- refused options --------------------------------------------------------------------------------------------------
TRAIN: Splits = {"train": {"train": True}, "test": {"train": False}}
REFUSED = [
    ("CIFAR11", TRAIN, "dataset is 'CIFAR11'. Did you mean 'CIFAR10'"),
    ("FakeData", TRAIN, "dataset is 'FakeData'"),
    ("ImageFolder", {"test": {"loader": "os.system"}}, "dataset is 'ImageFolder'"),
    ("__builtins__", TRAIN, "dataset is '__builtins__'"),
    ("CIFAR10", {"test": {"train": False, "download": True}}, "splits.test.download is unknown"),
    ("CIFAR10", {"test": {"train": False, "root": "/etc"}}, "splits.test.root is unknown"),
    ("CIFAR10", {"test": {"train": False, "transform": "eval"}}, "splits.test.transform is unknown"),
    ("CIFAR10", {"test": {"train": "no"}}, "splits.test.train is 'no'. Accepted: True, False"),
    ("CIFAR10", {"test": {"train": 1}}, "splits.test.train is 1"),
    ("CIFAR10", {"test": {}}, "splits.test has no 'train'"),
    ("CIFAR10", {"test": {"trian": False, "train": True}}, "splits.test.trian is unknown. Did you mean 'train'"),
    ("PCAM", {"test": {"split": "tset"}}, "splits.test.split is 'tset'. Did you mean 'test'"),
    ("DTD", {"test": {"split": "test", "partition": 11}}, "splits.test.partition is 11"),
    ("DTD", {"test": {"split": "test", "partition": True}}, "splits.test.partition is True"),
    ("FGVCAircraft", {"test": {"split": "test", "annotation_level": "family "}}, "Did you mean 'family'"),
]


@pytest.mark.parametrize(("dataset", "splits", "match"), REFUSED, ids=range(len(REFUSED)))
def test_refused_options(dataset: str, splits: Splits, match: str, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    with pytest.raises(DataError) as caught:
        read_dataset(a_card(dataset, splits, ("a", "b")), tmp_path)
    assert match in str(caught.value) and "'toy'" in str(caught.value)


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    for name, kind in KINDS.items():
        for method in ("download", "_download"):
            if hasattr(getattr(datasets, name), method):
                monkeypatch.setattr(getattr(datasets, name), method, lambda self: pytest.fail("a download"))
        first, values = next(iter(kind.accepts.items()))
        (tmp_path / "toy").mkdir(exist_ok=True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        with pytest.raises(DataError, match="is not there") as caught:
            read_dataset(a_card(name, {"test": {first: values[-1]}}, ("a", "b"), notes="Do so."), tmp_path)
        assert str(tmp_path / "toy") in str(caught.value) and "Do so." in str(caught.value)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_layout(find_card("cifar10"), tmp_path, monkeypatch=monkeypatch).card
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"missing there: data_batch_3\)(.|\n)*vlprompt data get cifar10"):
        read_dataset(card, tmp_path)


@pytest.mark.parametrize(("dataset", "library"), [("PCAM", "h5py"), ("SVHN", "scipy"), ("Flowers102", "scipy")])
def test_a_missing_library_is_named(
    dataset: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "toy").mkdir()
    with pytest.raises(DataError, match=f"needs {library}.*pip install {library}"):
        read_dataset(a_card(dataset, {"test": {"split": "test"}}, ("a", "b")), tmp_path)


# -- damaged and hostile files ----------------------------------------------------------------------------------------
class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_only_published_pickles_are_opened(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files have the right MD5 except one, which would run code."""
    from torchvision.datasets import cifar, utils

    card = write_layout(find_card("cifar10"), tmp_path / "data", monkeypatch=monkeypatch).card
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    monkeypatch.undo()
    sums = {path.name: utils.calculate_md5(path) for path in folder.iterdir()}
    for table in ("train_list", "test_list"):
        rows = [[name, sums[name]] for name, _ in getattr(cifar.CIFAR10, table)]
        monkeypatch.setattr(cifar.CIFAR10, table, rows)
    monkeypatch.setattr(cifar.CIFAR10, "meta", {**cifar.CIFAR10.meta, "md5": sums["batches.meta"]})
    assert len(read_dataset(card, tmp_path / "data").train) == 20  # the checks are on, and pass

    reader._opened.cache_clear()
    (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(DataError, match=rf"MD5 of \S*/{file} is not the published one. Remove the damaged files"):
        read_dataset(card, tmp_path / "data")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / file).read_bytes())
    assert (tmp_path / "exploded").exists()  # unpickling it does make the folder


def test_files_of_old_torchvision_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_layout(find_card("mnist"), tmp_path, monkeypatch=monkeypatch).card
    (tmp_path / "mnist" / "MNIST" / "processed").mkdir()
    with pytest.raises(DataError, match="processed has a format of old torchvision versions"):
        read_dataset(card, tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"\0\0\x08\x03\0\0\0\x05", b"\0\0\x08\x03\xff\xff\xff\xff" + bytes(40), b"no idx"]
)
def test_damaged_arrays_raise_data_errors(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_layout(find_card("mnist"), tmp_path, monkeypatch=monkeypatch).card
    (tmp_path / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(DataError, match="torchvision's MNIST cannot read"):
        read_dataset(card, tmp_path)


# -- labels -----------------------------------------------------------------------------------------------------------
def test_counts_are_renumbered_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = read("clevr_count", tmp_path, monkeypatch)
    assert lists.class_names == ["3", "4", "5", "6", "7", "8", "9", "10"]
    assert [sample.label for sample in lists.test] == list(range(8))
    assert lists.test[0].id == "val:0" and lists.sampler == "sorted-v1"
    card = find_card("clevr_count")
    fewer = dataclasses.replace(card, classes=Classes(7, "list", card.classes.names[:7]))
    with pytest.raises(DataError, match=r"labels run 3..10 with 8 values; 7 classes are expected"):
        read_dataset(fewer, tmp_path)


def test_images_without_labels_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_layout(find_card("fer2013"), tmp_path, monkeypatch=monkeypatch).card
    folder = tmp_path / "fer2013" / "fer2013"
    row = " ".join(["7"] * 48 * 48)
    (folder / "train.csv").write_text("emotion,pixels\n" + "".join(f"{label},{row}\n" for label in range(7)))
    (folder / "test.csv").write_text(f"pixels\n{row}\n")
    (folder / "fer2013.csv").unlink()
    with pytest.raises(DataError, match="images of test without a label in these files: 1"):
        read_dataset(card, tmp_path)


def test_a_class_without_training_images_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "toy" / "rendered-sst2"
    for folder in ("train/negative", "test/positive", "test/negative"):
        (root / folder).mkdir(parents=True)
        (root / folder / "0.png").write_bytes(encoded(".png"))
    (root / "train" / "positive").mkdir()
    card = a_card("RenderedSST2", {"train": {"split": "train"}, "test": {"split": "test"}}, ("bad", "good"))
    with pytest.raises(DataError, match="cannot read(.|\n)*positive"):  # torchvision refuses an empty class
        read_dataset(card, tmp_path)


def test_excluded_images_and_shared_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_layout(find_card("mnist"), tmp_path, monkeypatch=monkeypatch).card
    splits = {**TRAIN, "val": {"train": False}}
    changed = dataclasses.replace(card, options=TorchvisionOptions("MNIST", splits), excluded=("test:4",))
    lists = read_dataset(changed, tmp_path)
    assert not lists.sample_val and lists.val == lists.test and len(lists.test) == 9


# -- official splits on the folders of other protocols ----------------------------------------------------------------
def pets(folder: Path) -> None:
    for split, lines in {"trainval": ["Abyssinian_1 1 1 1", "beagle_2 2 2 1"], "test": ["beagle_3 2 2 1"]}.items():
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "images").mkdir()
    for name in ("Abyssinian_1", "beagle_2", "beagle_3"):
        (folder / "images" / f"{name}.jpg").write_bytes(encoded(".jpg"))


PETS: Splits = {"train": {"split": "trainval"}, "test": {"split": "test"}}


@pytest.mark.parametrize("folder", [".", "oxford-iiit-pet"], ids=["CoOp's layout", "torchvision's layout"])
def test_official_split_of_pets(folder: str, tmp_path: Path) -> None:
    pets(tmp_path / "toy" / folder)
    lists = read_dataset(a_card("OxfordIIITPet", PETS), tmp_path)
    assert lists.class_names == ["Abyssinian", "Beagle"]  # torchvision's, because the card names none
    assert [(sample.id, sample.label) for sample in lists.train] == [("trainval:0", 0), ("trainval:1", 1)]
    source = lists.test[0].source
    assert source.path == os.path.join(tmp_path, "toy", *folder.strip(".").split(), "images", "beagle_3.jpg")
    assert source.open().mode == "RGB" and source.stamp()


def test_other_official_splits(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    for name, text in {
        "labels/train2.txt": "banded/1.jpg\nzigzagged/1.jpg\n", "labels/test2.txt": "banded/2.jpg\n",
        "variants.txt": "707-320\nF-16A/B\n", "images_variant_train.txt": "1 F-16A/B\n2 707-320\n",
        "meta/train.json": '{"cheese_plate": ["banded/1"], "cheesecake": ["banded/2"]}',
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("banded/1.jpg", "banded/2.jpg", "zigzagged/1.jpg", "1.jpg", "2.jpg"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(encoded(".jpg"))

    def read_train(dataset: str, **arguments: Any) -> tuple[list[str], list[tuple[str, Any]]]:
        lists = read_dataset(a_card(dataset, {"train": arguments}), tmp_path)
        return lists.class_names, [(sample.id, sample.label) for sample in lists.train]

    assert read_train("DTD", split="train", partition=2) == (
        ["banded", "zigzagged"], [("train,partition=2:0", 0), ("train,partition=2:1", 1)],
    )  # fmt: skip
    assert read_train("FGVCAircraft", split="train") == (["707-320", "F-16A/B"], [("train:0", 1), ("train:1", 0)])
    assert read_train("Food101", split="train") == (["cheese_plate", "cheesecake"], [("train:0", 0), ("train:1", 1)])


def test_missing_and_linked_images_are_reported(tmp_path: Path) -> None:
    pets(tmp_path / "toy")
    card = a_card("OxfordIIITPet", PETS)
    (tmp_path / "toy" / "images" / "beagle_3.jpg").unlink()
    with pytest.raises(DataError, match="S15 images/beagle_3.jpg is missing"):
        read_dataset(card, tmp_path)
    (tmp_path / "secret.jpg").write_bytes(encoded(".jpg"))
    (tmp_path / "toy" / "images" / "beagle_3.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match="S05(.|\n)*through a link that leaves"):
        read_dataset(card, tmp_path)
    (tmp_path / "toy" / "annotations" / "test.txt").write_text("../../secret 2 2 1\n")
    with pytest.raises(DataError, match='S04 path "../secret.jpg" leaves the image folder'):
        read_dataset(card, tmp_path)
    shutil.rmtree(tmp_path / "toy" / "annotations")
    with pytest.raises(DataError, match="missing there: annotations/trainval.txt"):
        read_dataset(card, tmp_path)


def _attributes(function: Any) -> set[str]:
    """Return the attributes of its argument that a function of a kind reads, and those of the functions it calls."""
    return {name for name in function.__code__.co_names if name.startswith("_")}


@pytest.mark.parametrize("dataset", KINDS)
def test_the_installed_torchvision_has_the_private_attributes(dataset: str) -> None:
    kind, source = KINDS[dataset], inspect.getsource(sys.modules[getattr(datasets, dataset).__module__])
    used = set().union(*(_attributes(function) for function in (kind.labels, kind.images) if function is not None))
    assert [name for name in sorted(used) if name not in source] == []


@pytest.mark.parametrize("labels", [lambda data: data.gone, lambda data: data.__dict__["gone"], lambda data: [data]])
def test_another_torchvision_is_named(labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pets(tmp_path / "toy")
    changed = {**KINDS, "OxfordIIITPet": dataclasses.replace(KINDS["OxfordIIITPet"], labels=labels)}
    monkeypatch.setattr(reader, "KINDS", changed)
    text = r"torchvision [\d.+a-z]+ keeps the labels and paths of OxfordIIITPet elsewhere than versions 0.19 to 0.29"
    with pytest.raises(DataError, match=text):
        read_dataset(a_card("OxfordIIITPet", PETS), tmp_path)


def test_torchvision_is_imported_on_first_read() -> None:
    text = "import sys; from vlprompt.datasets.readers import shards, torchvision; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


TORCHVISION = [name for name in list_datasets() if isinstance(find_card(name).options, TorchvisionOptions)]


@pytest.mark.parametrize("name", TORCHVISION)
def test_downloads_go_to_the_folder_that_torchvision_reads(name: str, tmp_path: Path) -> None:
    card = find_card(name)
    assert isinstance(card.options, TorchvisionOptions)
    home = KINDS[card.options.dataset].home
    job = _Job(card, card.base(tmp_path), "", print, Network())
    for source in card.sources:
        target = job.target(source)
        if source.unpack is None and target is not None:
            assert target.parent == card.base(tmp_path) / home


def test_stamps_of_arrays_do_not_claim_to_follow_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [sample.source for sample in read("mnist", tmp_path, monkeypatch).test[:2]]
    assert stamps_of(sources) == ([source.stamp() for source in sources], "size and time")
