"""Reader of torchvision data sets: CIFAR, MNIST, SVHN and others, and official splits of some data sets.

A card is untrusted input: the accepted classes of ``torchvision.datasets`` and their arguments are listed in
:data:`KINDS`. Nothing is downloaded. The id of a sample is ``<split>:<index>``, because most images are not files.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprompt.datasets.card import Card, stated_class_names
from vlprompt.datasets.images import HASHED_BYTES, MAX_PIXELS, FileSource, ImageSource
from vlprompt.datasets.options import TorchvisionOptions
from vlprompt.datasets.paths import check_files, path_problem, resolve
from vlprompt.datasets.readers.checks import check_names
from vlprompt.datasets.readers.images import note_missing
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.readers.published import compare_with_card
from vlprompt.datasets.readers.torchvision_kinds import KINDS, Kind
from vlprompt.datasets.records import SPLITS, Sample, SplitLists
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

Arguments = tuple[tuple[str, Any], ...]


def read_torchvision(card: Card, base: Path, report: Report) -> SplitLists:
    """Read a data set through its class in ``torchvision.datasets``.

    ``base`` is torchvision's root. Image files may also be directly in ``base``, or under a trailing part of the path
    that torchvision expects, so that official splits work on the folders of other protocols.

    Labels other than 0 to n-1 are renumbered in their order if there are as many as class names: CLEVR's counts 3 to
    10 become 0 to 7.

    Raises:
        DataError: If the card names a class or argument that is not accepted, or files are missing or damaged; other
            problems are added to ``report``.
    """
    options = card.options
    assert isinstance(options, TorchvisionOptions)
    kind = _kind(card, options)
    contents = {split: _read_split(card, kind, options.splits[split], base, report) for split in options.splits}
    names = stated_class_names(card) or next((content.classes for content in contents.values() if content.classes), [])
    if not names:
        report.error("S20", f"{options.dataset} has no class names; list them on the card: classes.names")
        report.stop()
    check_names(names, report, card)
    number = _numbers(contents, names, report)
    excluded = set(card.excluded)
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for split, content in contents.items():
        for index, (source, label) in enumerate(zip(content.sources, content.labels, strict=True)):
            sample_id = f"{content.prefix}:{index}"
            if source is not None and label in number and sample_id not in excluded:
                samples[split].append(Sample(sample_id, number[label], source))
    shared = "val" in options.splits and options.splits["val"] == options.splits.get("test")
    order = "sorted-v1" if kind.sorted else "dassl-v1"
    lists = SplitLists(names, samples["train"], samples["val"], samples["test"], order, sample_val=not shared)
    if not report.failed:
        compare_with_card(card, lists, report)
    return lists


@dataclass(frozen=True)
class _SplitContent:
    prefix: str
    sources: list[ImageSource | None]
    labels: list[int | None]
    classes: list[str]


def _read_split(card: Card, kind: Kind, given: Mapping[str, Any], base: Path, report: Report) -> _SplitContent:
    dataset = getattr(card.options, "dataset", "")
    arguments = tuple((name, given[name]) for name in kind.accepts if name in given)
    place = _place(card, kind, arguments, base)
    try:
        with _root(kind, base, place) as root:
            data = _open(dataset, root, arguments) if kind.images else _opened(*_key(dataset, root, arguments))
            labels, paths = _labels_and_paths(dataset, kind, data)
    except _OtherVersion:
        raise
    except DataError as error:
        report.error("S01", str(error))
        report.stop()
    sources: list[ImageSource | None]
    if kind.images is None:
        sources = [TorchvisionSource(dataset, root, arguments, index) for index in range(len(labels))]
    else:
        sources = _files(card, place, [os.path.relpath(path, Path(root, kind.home)) for path in paths], report)
    return _SplitContent(_prefix(arguments), sources, labels, list(getattr(data, "classes", ())))


class _OtherVersion(DataError):
    """torchvision keeps labels or paths elsewhere."""


def _labels_and_paths(dataset: str, kind: Kind, data: Any) -> tuple[list[int | None], list[str]]:
    """Return what :mod:`torchvision_kinds` reads from a data set object, which torchvision does not document."""
    try:
        labels = [None if label is None else int(label) for label in kind.labels(data)]
        paths = [] if kind.images is None else [str(path) for path in kind.images(data)]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _OtherVersion(
            f"torchvision {version('torchvision')} keeps the labels and paths of {dataset} elsewhere than versions "
            f"0.19 to 0.29 ({type(error).__name__}: {error}): pip install 'torchvision<0.30'"
        ) from error
    return labels, paths


# -- accepted options -------------------------------------------------------------------------------------------------
def _kind(card: Card, options: TorchvisionOptions) -> Kind:
    where = f"Data set card {card.name!r}: reader_options"
    if options.dataset not in KINDS:
        raise DataError(f"{where}.dataset is {options.dataset!r}.{did_you_mean(options.dataset, KINDS)}")
    kind = KINDS[options.dataset]
    first = next(iter(kind.accepts))
    problems = []
    for split, given in options.splits.items():
        key = f"{where}.splits.{split}"
        if first not in given:
            problems.append(f"{key} has no {first!r}; one of {', '.join(map(str, kind.accepts[first]))} is expected")
        for name, value in given.items():
            accepted = kind.accepts.get(name, ())
            if name not in kind.accepts:
                problems.append(f"{key}.{name} is unknown.{did_you_mean(name, kind.accepts)}")
            elif not any(value is other or (type(value) is type(other) and value == other) for other in accepted):
                problems.append(f"{key}.{name} is {value!r}.{did_you_mean(str(value), map(str, accepted))}")
    if problems:
        raise DataError("\n".join(problems))
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        raise DataError(f"Reading {card.name} needs {kind.needs}, which is not installed: pip install {kind.needs}")
    return kind


def _prefix(arguments: Arguments) -> str:
    """Return the prefix of sample ids: the split and the other arguments."""
    (_, value), *rest = arguments
    split = {True: "train", False: "test"}[value] if isinstance(value, bool) else str(value)
    return split + "".join(f",{name}={other}" for name, other in rest)


# -- files ------------------------------------------------------------------------------------------------------------
def _patterns(kind: Kind, arguments: Arguments) -> list[str]:
    value = str(arguments[0][1])
    return [pattern.replace("{}", kind.words.get(value, value)) for pattern in kind.files]


def _place(card: Card, kind: Kind, arguments: Arguments, base: Path) -> Path:
    """Return the folder of the files."""
    steps = [] if kind.home == "." else kind.home.split("/")
    places = (
        [base.joinpath(*steps[start:]) for start in range(len(steps) + 1)] if kind.images else [base.joinpath(*steps)]
    )
    patterns = _patterns(kind, arguments)

    def absent(place: Path) -> list[str]:
        return [pattern for pattern in patterns if not any(place.glob(pattern))]

    missing = {place: absent(place) for place in places}
    best = min(places, key=lambda place: len(missing[place]))
    for path in (path for pattern in patterns for path in best.glob(pattern)):
        resolve(best, path.relative_to(best).as_posix(), folder=path.is_dir())
    if missing[best]:
        looked = ", ".join(missing[best])
        raise DataError(missing_text(card, base, f"{best} (missing there: {looked})"))
    if kind.home == "MNIST/raw" and best.with_name("processed").exists():
        raise DataError(
            f"{best.with_name('processed')} has a format of old torchvision versions, which torchvision prefers to the "
            "published files. Move it away."
        )
    return best


@contextmanager
def _root(kind: Kind, base: Path, place: Path) -> Iterator[str]:
    """Yield the root for torchvision: ``base``, or a temporary folder with a link to ``place``."""
    if place == base / kind.home:
        yield str(base)
        return
    with tempfile.TemporaryDirectory(prefix="vlprompt-") as folder:
        link = Path(folder, kind.home)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(place, target_is_directory=True)
        except OSError as error:
            raise DataError(
                f"torchvision expects {base / kind.home}, and a link to {place} cannot be created ({error}). Move the "
                "folder there."
            ) from error
        yield folder


def _files(card: Card, place: Path, paths: list[str], report: Report) -> list[ImageSource | None]:
    """Return the image files (rules S04, S05 and S15); ``None`` for those with a problem in ``report``."""
    wrong = {path: problem for path in paths if (problem := path_problem(path))}
    report.errors("S04", wrong.values())
    lost, outside = map(set, check_files(place, dict.fromkeys(path for path in paths if path not in wrong)))
    report.errors("S05", [f'"{path}" is reached through a link that leaves {place}' for path in sorted(outside)])
    note_missing(card, sorted(lost), len(paths), place, report)
    unusable = lost | outside | set(wrong)
    return [None if path in unusable else FileSource(os.path.join(place, path)) for path in paths]


def _numbers(contents: Mapping[str, _SplitContent], names: list[str], report: Report) -> dict[int | None, int]:
    """Return the labels 0 to n-1 by torchvision's labels (rules S06 and S07)."""
    for split, content in contents.items():
        if unlabelled := content.labels.count(None):
            report.error("S06", f"images of {split} without a label in these files: {unlabelled:,}")
    values = sorted({label for content in contents.values() for label in content.labels if label is not None})
    if not values:
        report.stop()
    if 0 <= values[0] and values[-1] < len(names):
        number: dict[int | None, int] = {value: value for value in values}
    elif len(values) == len(names):
        number = {value: rank for rank, value in enumerate(values)}
    else:
        text = f"labels run {values[0]}..{values[-1]} with {len(values):,} values"
        report.error("S06", f"{text}; {len(names):,} classes are expected")
        return {}
    if "train" in contents:
        trained = {number[label] for label in contents["train"].labels if label is not None}
        absent = [name for label, name in enumerate(names) if label not in trained]
        report.errors("S07", [f"class {name!r} has no training image" for name in absent])
    return number


# -- images in arrays -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TorchvisionSource:
    """An image that torchvision keeps in an array or reads from a file of many images.

    Attributes:
        dataset: Class in ``torchvision.datasets``, a name in :data:`KINDS`.
        root: Root of the data set.
        arguments: Arguments that select the split.
        index: Index of the image.
    """

    dataset: str
    root: str
    arguments: Arguments
    index: int

    def open(self) -> Image:
        """Return the RGB image. Raises :class:`~vlprompt.errors.DataError` that names it."""
        name = f"{self.index} of {self.dataset} under {self.root}"
        try:
            image: Image = _opened(*_key(self.dataset, self.root, self.arguments))[self.index][0]
        except (DataError, MemoryError):
            raise
        except Exception as error:  # arrays of a damaged file raise many types
            raise DataError(f"Image {name} cannot be read: {error}.") from error
        # As in decode_rgb: brightness is not clipped silently, and conversion precedes every other operation.
        if image.mode.startswith(("I", "F")) or image.width * image.height > MAX_PIXELS:
            raise DataError(f"Image {name} is {image.size} of mode {image.mode}; 8-bit images are expected.")
        return image.convert("RGB")

    def stamp(self) -> str:
        """Return sizes and modification times of the files, and the index."""
        return f"{_state(self.dataset, self.root, self.arguments)}-{self.index}"

    def stored_bytes(self) -> int:
        """Return more than are hashed: the files of many images are followed by their sizes and times."""
        return HASHED_BYTES + 1

    def content(self) -> str:
        """Return :meth:`stamp`."""
        return self.stamp()


def _key(dataset: str, root: str, arguments: Arguments) -> tuple[str, str, Arguments, str]:
    return dataset, root, arguments, _state(dataset, root, arguments)


def _state(dataset: str, root: str, arguments: Arguments) -> str:
    try:
        status = [os.stat(path) for path in _found_files(dataset, root, arguments)]
    except OSError as error:
        raise DataError(
            f"Images of {dataset} under {root} cannot be read: {error.strerror}: {error.filename}."
        ) from error
    return "-".join(f"{entry.st_size}.{entry.st_mtime_ns}" for entry in status)


@functools.lru_cache(maxsize=16)
def _found_files(dataset: str, root: str, arguments: Arguments) -> list[str]:
    kind = KINDS[dataset]
    home = glob.escape(os.path.join(root, kind.home))
    return sorted(path for pattern in _patterns(kind, arguments) for path in glob.glob(os.path.join(home, pattern)))


@functools.lru_cache(maxsize=6)
def _opened(dataset: str, root: str, arguments: Arguments, state: str) -> Any:
    """Open a torchvision data set, once per process and state of its files.

    Unlike an archive it is not reopened after a fork: these objects hold arrays, not open files, and forked workers
    share the memory pages of their parent.
    """
    del state
    return _open(dataset, root, arguments)


def _open(dataset: str, root: str, arguments: Arguments) -> Any:
    from torchvision import datasets

    dataset_class = getattr(datasets, dataset)
    try:
        return dataset_class(root, **dict(arguments))
    except MemoryError:
        raise
    except Exception as error:  # parsers of damaged files raise many types
        damaged = _damaged(dataset_class, root)
        # torchvision's advice, download=True, does not apply here.
        text = "" if "download=True" in str(error) else f" ({type(error).__name__}: {str(error)[:200]})"
        which = f": the MD5 of {', '.join(damaged)} is not the published one" if damaged else text
        raise DataError(
            f"torchvision's {dataset} cannot read {root}{which}. Remove the damaged files and fetch them again"
        ) from error


def _damaged(dataset_class: Any, root: str) -> list[str]:
    from torchvision.datasets.utils import check_integrity

    meta = getattr(dataset_class, "meta", None)
    files = [*getattr(dataset_class, "train_list", ()), *getattr(dataset_class, "test_list", ())]
    files += [(meta["filename"], meta["md5"])] if meta else []
    places = [(os.path.join(root, getattr(dataset_class, "base_folder", ""), name), md5) for name, md5 in files]
    places += [(os.path.join(root, name), md5) for _, name, md5 in getattr(dataset_class, "split_list", {}).values()]
    return [path for path, md5 in places if os.path.exists(path) and not check_integrity(path, md5)]
