"""Writers of the file formats that torchvision classes read, for :mod:`tests.datasets.layouts`."""

from __future__ import annotations

import csv
import json
import pickle  # noqa: TID251  (CIFAR's format, which torchvision reads)
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Build(Protocol):
    """The data set that is being built."""

    base: Path
    names: list[str]

    def paint(self, path: str, number: int = 0) -> None: ...

    def write(self, path: str, text: str) -> None: ...


def _pixels(count: int, size: int, channels: int = 3) -> np.ndarray[Any, Any]:
    """Images as [N, H, W, C]; the first pixel of each holds its number."""
    pixels = np.tile(
        np.arange(size * size * channels, dtype=np.uint8).reshape(1, size, size, channels), (count, 1, 1, 1)
    )
    pixels[:, 0, 0, 0] = np.arange(count) % 256
    return pixels


def _cifar(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    ten = dataset == "CIFAR10"
    folder = build.base / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    files = {
        True: [f"data_batch_{n}" for n in range(1, 6)] if ten else ["train"],
        False: ["test_batch" if ten else "test"],
    }
    for train, names in files.items():
        labels = splits.get(train, [])
        data = _pixels(len(labels), 32).transpose(0, 3, 1, 2).reshape(-1, 3072)
        step = -(-len(labels) // len(names))
        for number, name in enumerate(names):
            rows = slice(number * step, (number + 1) * step)
            entry = {"data": data[rows], "labels" if ten else "fine_labels": labels[rows]}
            (folder / name).write_bytes(pickle.dumps(entry))
    meta = {"label_names" if ten else "fine_label_names": [f"own {name}" for name in build.names]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))


def _mnist(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    folder = build.base / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for train, prefix in ((True, "train"), (False, "t10k")):
        labels = np.array(splits.get(train, []), np.uint8)
        data = _pixels(len(labels), 28, 1)
        head = struct.pack(">IIII", 0x803, len(labels), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + data.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


def _svhn(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    import scipy.io as scipy_io

    for split, labels in splits.items():
        y = np.array([[10 if label == 0 else label] for label in labels], np.uint8)
        scipy_io.savemat(
            build.base / f"{split}_32x32.mat", {"X": _pixels(len(labels), 32).transpose(1, 2, 3, 0), "y": y}
        )


def _stl10(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    folder = build.base / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for split in ("train", "test"):
        labels = np.array(splits.get(split, []), np.uint8)
        (folder / f"{split}_X.bin").write_bytes(_pixels(len(labels), 96).transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).tobytes())


def _fer2013(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    path = build.base / "fer2013" / "fer2013.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["emotion", "pixels", "Usage"])
        for split, labels in splits.items():
            usages = ("Training",) if split == "train" else ("PublicTest", "PrivateTest")
            pixels = _pixels(len(labels), 48, 1).reshape(len(labels), -1)
            for number, label in enumerate(labels):
                table.writerow([label, " ".join(map(str, pixels[number])), usages[number % len(usages)]])


def _pcam(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    import h5py

    (build.base / "pcam").mkdir(parents=True)
    for split, labels in splits.items():
        published = {"val": "valid"}.get(split, split)
        for what, data in (("x", _pixels(len(labels), 96)), ("y", np.array(labels, np.uint8).reshape(-1, 1, 1, 1))):
            with h5py.File(build.base / "pcam" / f"camelyonpatch_level_2_split_{published}_{what}.h5", "w") as file:
                file[what] = data


def _gtsrb(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    for number, label in enumerate(splits.get("train", [])):
        build.paint(f"gtsrb/GTSRB/Training/{label:05d}/00000_{number:05d}.ppm", number)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate(splits.get("test", [])):
        build.paint(f"gtsrb/GTSRB/Final_Test/Images/{number:05d}.ppm", number)
        rows.append(f"{number:05d}.ppm;12;10;1;1;9;9;{label}")
    build.write("gtsrb/GT-final_test.csv", "\n".join(rows) + "\n")


def _country211(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    codes = [chr(65 + number // 26) + chr(65 + number % 26) for number in range(len(build.names))]
    for split, labels in splits.items():
        for number, label in enumerate(labels):
            build.paint(f"country211/{split}/{codes[label]}/{number}.jpg", number)


def _rendered_sst2(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    for split, labels in splits.items():
        for number, label in enumerate(labels):
            folder = {"val": "valid"}.get(split, split)
            build.paint(f"rendered-sst2/{folder}/{('negative', 'positive')[label]}/{number}.png", number)


def _clevr(build: Build, dataset: str, splits: dict[Any, list[int]]) -> None:
    for split, labels in splits.items():
        scenes = []
        for number, label in enumerate(labels):
            name = f"CLEVR_{split}_{number:06d}.png"
            build.paint(f"clevr/CLEVR_v1.0/images/{split}/{name}", number)
            scenes.append({"image_filename": name, "objects": [{"shape": "cube"}] * (label + 3)})
        build.write(f"clevr/CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}))


#: By class: the module with the MD5 check of the published files, and the writer of its format.
TORCHVISION: dict[str, tuple[str, Callable[[Build, str, dict[Any, list[int]]], None]]] = {
    "CIFAR10": ("cifar", _cifar),
    "CIFAR100": ("cifar", _cifar),
    "MNIST": ("", _mnist),
    "SVHN": ("svhn", _svhn),
    "STL10": ("stl10", _stl10),
    "FER2013": ("fer2013", _fer2013),
    "PCAM": ("", _pcam),
    "GTSRB": ("", _gtsrb),
    "Country211": ("", _country211),
    "RenderedSST2": ("", _rendered_sst2),
    "CLEVRClassification": ("", _clevr),
}
