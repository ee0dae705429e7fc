"""The classes of ``torchvision.datasets`` that a card may name, and their properties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Properties of a class of ``torchvision.datasets``.

    Attributes:
        home: Folder of the data set under torchvision's root.
        accepts: Arguments a card may set, with their accepted values; the first argument names the split in ids.
        labels: Returns the labels of a data set object without decoding an image.
        files: Required files under ``home``; ``{}`` stands for the split, ``*`` is a wildcard.
        words: Name of a split in ``files``, where it differs from the argument.
        images: Returns the image paths of a data set object; ``None`` if images are in arrays.
        needs: Library that torchvision needs for the data set.
        sorted: Whether images are ordered by sorted file names instead of a list.
    """

    home: str
    accepts: Mapping[str, tuple[Any, ...]]
    labels: Callable[[Any], Sequence[Any]]
    files: tuple[str, ...]
    words: Mapping[str, str] = field(default_factory=dict)
    images: Callable[[Any], Sequence[Any]] | None = None
    needs: str = ""
    sorted: bool = False


def _targets(data: Any) -> Any:
    return data.targets


def _labels(data: Any) -> Any:
    return data._labels


def _seconds(data: Any) -> list[Any]:
    return [label for _, label in data._samples]


def _firsts(data: Any) -> list[Any]:
    return [image for image, _ in data._samples]


def _image_files(data: Any) -> Any:
    return data._image_files


def _pcam_labels(data: Any) -> Any:
    files = data._FILES[data._split]
    with data.h5py.File(data._base_folder / files["targets"][0]) as targets:
        return targets["y"][:, 0, 0, 0]


_TRAIN = {"train": (True, False)}
_VAL = {"val": "valid"}
_CIFAR10 = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
_MNIST = tuple(
    f"{prefix}-{content}-ubyte" for prefix in ("train", "t10k") for content in ("images-idx3", "labels-idx1")
)
_STL10 = tuple(f"{name}.bin" for name in ("train_X", "train_y", "unlabeled_X", "test_X", "test_y"))


def _split(*names: str) -> dict[str, tuple[Any, ...]]:
    return {"split": names}


#: The classes that a card may name.
KINDS: Mapping[str, Kind] = {
    # CIFAR's files are pickles, the only ones that vlprompt opens. torchvision unpickles them after it has compared the
    # MD5 of every file with the published one, so no other pickle is loaded (tested).
    "CIFAR10": Kind("cifar-10-batches-py", _TRAIN, _targets, _CIFAR10),
    "CIFAR100": Kind("cifar-100-python", _TRAIN, _targets, ("train", "test", "meta")),
    "MNIST": Kind("MNIST/raw", _TRAIN, _targets, _MNIST),
    "SVHN": Kind(".", _split("train", "test", "extra"), lambda data: data.labels, ("{}_32x32.mat",), needs="scipy"),
    "STL10": Kind("stl10_binary", _split("train", "test"), lambda data: data.labels, _STL10),
    "FER2013": Kind("fer2013", _split("train", "test"), _seconds, ("*.csv",)),
    "PCAM": Kind(
        "pcam", _split("train", "val", "test"), _pcam_labels,
        ("camelyonpatch_level_2_split_{}_x.h5", "camelyonpatch_level_2_split_{}_y.h5"), _VAL, needs="h5py",
    ),
    "GTSRB": Kind(
        "gtsrb", _split("train", "test"), _seconds, ("GTSRB/{}",), {"train": "Training", "test": "Final_Test/Images"},
        _firsts, sorted=True,
    ),
    "Country211": Kind(
        "country211", _split("train", "valid", "test"), _targets, ("{}",),
        images=lambda data: [path for path, _ in data.samples], sorted=True,
    ),
    "RenderedSST2": Kind(
        "rendered-sst2", _split("train", "val", "test"), _seconds, ("{}/negative", "{}/positive"), _VAL, _firsts,
        sorted=True,
    ),
    "CLEVRClassification": Kind(
        "clevr/CLEVR_v1.0", _split("train", "val"), _labels, ("images/{}", "scenes/CLEVR_{}_scenes.json"),
        images=_image_files, sorted=True,
    ),
    "OxfordIIITPet": Kind(
        "oxford-iiit-pet", _split("trainval", "test"), _labels, ("images", "annotations/{}.txt"),
        images=lambda data: data._images,
    ),
    "Flowers102": Kind(
        "flowers-102", _split("train", "val", "test"), _labels, ("jpg", "imagelabels.mat", "setid.mat"),
        images=_image_files, needs="scipy",
    ),
    "DTD": Kind(
        "dtd/dtd", {**_split("train", "val", "test"), "partition": tuple(range(1, 11))}, _labels, ("images", "labels"),
        images=_image_files,
    ),
    "Food101": Kind(
        "food-101", _split("train", "test"), _labels, ("images", "meta/{}.json"), images=_image_files,
    ),
    "FGVCAircraft": Kind(
        "fgvc-aircraft-2013b/data",
        {**_split("train", "val", "trainval", "test"), "annotation_level": ("variant", "family", "manufacturer")},
        _labels, ("images", "variants.txt"), images=_image_files,
    ),
    "StanfordCars": Kind(
        "stanford_cars", _split("train", "test"), _seconds, ("devkit", "cars_{}"), images=_firsts, needs="scipy",
    ),
}  # fmt: skip
