"""Invented mini data sets on disk, in the layout that a card describes, generated from the card."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.datasets.torchvision_files import TORCHVISION
from vlprompt.datasets.card import Card, imagenet_names
from vlprompt.datasets.catalogue import card_class_names
from vlprompt.datasets.options import FolderOptions, ListFileOptions, ShardOptions, SplitJsonOptions, TorchvisionOptions

SPLITS = ("train", "val", "test")
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".ppm": "PPM", ".webp": "WEBP"}
_encoded: dict[tuple[str, int], bytes] = {}


@dataclass(frozen=True)
class Expected:
    """Expected result of reading a mini data set.

    Attributes:
        card: The card to read with, without the hashes of the published data.
        counts: Images by split.
        class_names: Names by label.
        domains: Domains that occur.
    """

    card: Card
    counts: dict[str, int]
    class_names: list[str]
    domains: set[str] = field(default_factory=set)


@dataclass
class _Build:
    card: Card
    base: Path
    per_class: dict[str, int]
    names: list[str]
    monkeypatch: pytest.MonkeyPatch | None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def labels(self, split: str) -> list[int]:
        """Labels of a split, in an order that is not sorted by class."""
        return list(range(len(self.names))) * self.per_class[split]

    def paint(self, path: str, number: int = 0) -> None:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(target.suffix, number))

    def write(self, path: str, text: str) -> None:
        target = self.base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def write_layout(
    card: Card,
    root: Path,
    *,
    per_class: tuple[int, int, int] = (2, 1, 1),
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> Expected:
    """Build a mini data set for ``card`` under the data root ``root``.

    Args:
        card: The card.
        root: The data root.
        per_class: Images of each class in train, val and test (of each domain).
        monkeypatch: Disables torchvision's MD5 checks; needed for torchvision data sets only.
    """
    names = card_class_names(card) or _invented(card)
    build = _Build(card, card.base(root), dict(zip(SPLITS, per_class, strict=True)), names, monkeypatch)
    build.base.mkdir(parents=True, exist_ok=True)
    _WRITERS[card.reader](build)
    known = card_class_names(card) is not None
    classes = card.classes if known else replace(card.classes, names_sha256=None)
    splits = {name: replace(split, content_sha256=None, file_sha256=None) for name, split in card.splits.items()}
    return Expected(replace(card, classes=classes, splits=splits), build.counts, build.names, set(card.domains))


def encoded(suffix: str, number: int = 0) -> bytes:
    """An encoded image of 12 x 10 pixels; every fifth is grey."""
    key = suffix.lower(), number % 5
    if key not in _encoded:
        pixels = (np.arange(360).reshape(10, 12, 3) * (key[1] + 3) % 256).astype(np.uint8)
        image = Image.fromarray(pixels)
        stream = io.BytesIO()
        (image.convert("L") if key[1] == 4 else image).save(stream, _FORMATS[key[0]])
        _encoded[key] = stream.getvalue()
    return _encoded[key]


def _invented(card: Card) -> list[str]:
    """Names whose byte order differs from alphabetical order."""
    count = card.classes.count or 3
    names = [f"{word}_{number:03d}" for number in range(count) for word in ("Zebra", "ape")]
    return sorted(names, key=str.encode)[count // 2 : count // 2 + count]


# -- split files, class folders ---------------------------------------------------------------------------------------
def _split_json(build: _Build) -> None:
    options = build.card.options
    assert isinstance(options, SplitJsonOptions)
    content: dict[str, list[list[Any]]] = {}
    archives: dict[str, list[tuple[str, bytes]]] = {}
    folders = list(build.card.domains.values()) or ["photos"]
    for split in SPLITS:
        content[split] = []
        for folder in folders:
            for number, label in enumerate(build.labels(split)):
                path = f"{folder}/{split}_{number}.jpg"
                content[split].append([path, label, build.names[label]])
                if options.archive is None:
                    build.paint(f"{options.image_dir}/{path}", number)
                else:
                    member = path.partition("/")[2] if "{}" in options.archive else path
                    archives.setdefault(options.archive.format(folder), []).append((member, encoded(".jpg", number)))
        build.counts[split] = len(content[split])
    for name, members in archives.items():
        (build.base / name).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(build.base / name, "w") as archive:
            for member, data in members:
                archive.writestr(member, data)
    build.write(options.split_file, json.dumps(content, indent=4))


def _folder(build: _Build) -> None:
    card, options = build.card, build.card.options
    assert isinstance(options, FolderOptions)
    folders = _class_folders(card, options, build.names)
    if card.classes.names_from == "folders":
        build.names = [name.lower() if options.lower else name for name in folders]
    words = list(card.domains.values()) or [""]
    size: dict[str, int] = {}
    for split, patterns in options.splits.items():
        for pattern in patterns:
            for place in dict.fromkeys(pattern.replace("{domain}", word) for word in words):
                if place not in size:
                    size[place] = build.per_class[split]
                    where = f"{options.image_dir}/{place}"
                    stem = f"{split}_{place.strip('.').replace('/', '_')}"
                    for path in (f"{folder}/{stem}{n}.JPEG" for folder in folders for n in range(size[place])):
                        build.paint(f"{where}/{path}", len(path))
                    for stray in options.ignore:
                        build.write(f"{where}/{stray}", "no class folder")
                build.counts[split] += size[place] * len(folders)


def _class_folders(card: Card, options: FolderOptions, names: list[str]) -> list[str]:
    """Folders of the classes by label."""
    if options.sort == "int":
        return [str(number) for number in range(len(names))]
    if card.classes.keys:
        return list(card.classes.keys)
    if card.classes.names_from == "wnids":
        return list(imagenet_names())
    if sorted(names, key=str.encode) == names:
        return names
    return [f"{number:04d}" for number in range(len(names))]


# -- lists ------------------------------------------------------------------------------------------------------------
def _list_file(build: _Build) -> None:
    options = build.card.options
    assert isinstance(options, ListFileOptions)
    if options.names_file is not None:
        build.write(options.names_file, "".join(f"{name}\n" for name in build.names))
    writer = {"lines": _lines, "jsonl": _lines, "per_class": _per_class, "coco": _coco}[options.format]
    size: dict[str, int] = {}
    words = list(build.card.domains.values()) or [""]
    for split, patterns in options.splits.items():
        for pattern in patterns:
            for word in words if "{domain}" in pattern else [""]:
                name = pattern.replace("{domain}", word)
                if name not in size:
                    size[name] = writer(build, options, split, name, word)
                build.counts[split] += size[name]


def _image(build: _Build, options: ListFileOptions, split: str, path: str, number: int) -> None:
    pieces = (options.image_dir, options.folders.get(split, ""), path + options.suffix)
    build.paint("/".join(piece for piece in pieces if piece), number)


def _lines(build: _Build, options: ListFileOptions, split: str, name: str, word: str) -> int:
    keys = build.card.classes.keys or tuple(build.names)
    lines = []
    labels = build.labels(split)
    for number, label in enumerate(labels):
        folder = keys[label] if options.label == "folder" else f"{word}/class_{label}".strip("/")
        path = f"{folder}/{name.replace('/', '_')}_{number}" + ("" if options.suffix else ".png")
        _image(build, options, split, path, number)
        value: Any = label + options.first_label if options.label == "number" else keys[label]
        if options.format == "jsonl":
            lines.append(json.dumps({"id": number, options.image_key: path, options.label_key: value}))
        else:
            lines.append(path if options.label == "folder" else f"{path} {value}")
    build.write(name, "".join(f"{line}\n" for line in lines))
    return len(labels)


def _per_class(build: _Build, options: ListFileOptions, split: str, pattern: str, word: str) -> int:
    """Every list names every image: 1 for its class, 0 (difficult) for the next class. CR LF as in copies of VOC."""
    labels = build.labels(split)
    images = [f"{SPLITS.index(split)}{number:05d}" for number in range(len(labels))]
    for number, image in enumerate(images):
        _image(build, options, split, image, number)
    count = len(build.names)
    for index, key in enumerate(build.card.classes.keys or build.names):
        flags = ["1" if label == index else "0" if (label + 1) % count == index else "-1" for label in labels]
        lines = [f"{image} {flag:>2}\r\n" for image, flag in zip(images, flags, strict=True)]
        build.write(pattern.replace("{class}", key), "".join(lines))
    return len(images)


def _coco(build: _Build, options: ListFileOptions, split: str, name: str, word: str) -> int:
    """Category ids have gaps and another order than the names; the last image has no box."""
    number_of = {label: 2 * len(build.names) - 2 * label + 1 for label in range(len(build.names))}
    labels = build.labels(split)
    images = [{"id": 7 * number + 3, "file_name": f"{split}_{number:012d}.jpg"} for number in range(len(labels) + 1)]
    boxes = [
        {"id": number, "image_id": 7 * number + 3, "category_id": number_of[label], "iscrowd": number % 2}
        for number, label in enumerate(labels)
    ]
    for number, image in enumerate(images):
        _image(build, options, split, str(image["file_name"]), number)
    keys = build.card.classes.keys or tuple(build.names)
    categories = [{"id": number_of[label], "name": keys[label]} for label in reversed(range(len(keys)))]
    build.write(name, json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return len(images)


# -- torchvision ------------------------------------------------------------------------------------------------------
def _torchvision(build: _Build) -> None:
    options = build.card.options
    assert isinstance(options, TorchvisionOptions)
    module, writer = TORCHVISION[options.dataset]
    if build.monkeypatch is not None and module:
        # The MD5 checks have other tests.
        target = f"torchvision.datasets.{module}.check_integrity"
        build.monkeypatch.setattr(target, lambda path, md5=None: os.path.isfile(path))
    labels_of: dict[Any, list[int]] = {}
    for split, arguments in options.splits.items():
        labels_of[next(iter(arguments.values()))] = labels = build.labels(split)
        build.counts[split] = len(labels)
    writer(build, options.dataset, labels_of)


# -- shards -----------------------------------------------------------------------------------------------------------
def _shards(build: _Build) -> None:
    options = build.card.options
    assert isinstance(options, ShardOptions)
    write = _webdataset if options.format == "webdataset" else _parquet
    size: dict[str, int] = {}
    for split, paths in options.splits.items():
        for path in paths:
            if path not in size:
                size[path] = write(build, options, split, path)
            build.counts[split] += size[path]
    if options.format == "webdataset":
        build.write("classnames.txt", "".join(f"{name}\n" for name in build.names))


def _webdataset(build: _Build, options: ShardOptions, split: str, folder: str) -> int:
    labels = build.labels(split)
    (build.base / folder).mkdir(parents=True, exist_ok=True)
    build.write(f"{folder}/nshards.txt", "2\n")
    half = len(labels) // 2
    for shard, numbers in enumerate((range(half), range(half, len(labels)))):
        with tarfile.open(build.base / folder / f"{shard}.tar", "w") as archive:
            for number in numbers:
                members = {"webp": encoded(".webp", number)}
                if build.card.multilabel:
                    stream = io.BytesIO()
                    np.save(stream, np.eye(len(build.names), dtype=np.int64)[labels[number]])
                    members["npy"] = stream.getvalue()
                else:
                    members["cls"] = str(labels[number]).encode()
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"s{number:07d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return len(labels)


def _parquet(build: _Build, options: ShardOptions, split: str, pattern: str) -> int:
    """Row groups of two images, as Hugging Face's ``datasets`` writes them."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    labels = build.labels(split)
    images = [{"bytes": encoded(".png", number), "path": f"{number}.png"} for number in range(len(labels))]
    label = {"names": build.names, "_type": "ClassLabel"}
    said: list[Any] = [[label] for label in labels] if build.card.multilabel else labels
    features = {
        options.image_key: {"_type": "Image"},
        options.label_key: {"feature": label, "_type": "Sequence"} if build.card.multilabel else label,
    }
    table = arrow.table({options.image_key: images, options.label_key: said})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = build.base / pattern.replace("*", "00000-of-00001")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)
    return len(labels)


_WRITERS: dict[str, Callable[[_Build], None]] = {
    "split_json": _split_json,
    "folder": _folder,
    "list_file": _list_file,
    "torchvision": _torchvision,
    "shards": _shards,
}
