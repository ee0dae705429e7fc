"""Reader of class folders: ImageNet and its variants, data sets with domains, and a folder of images of the user."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlprompt.datasets.card import Card, Classes, imagenet_names, stated_class_names
from vlprompt.datasets.images import IMAGE_SUFFIXES, FileSource, is_image
from vlprompt.datasets.kept_split import read_kept
from vlprompt.datasets.options import FolderOptions
from vlprompt.datasets.paths import is_inside, links_allowed, resolve
from vlprompt.datasets.readers.checks import check_names
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.readers.names import NAMES_JSON, NAMES_TEXT, names_of
from vlprompt.datasets.readers.published import compare_with_card
from vlprompt.datasets.records import SPLITS, Sample, SplitLists, class_name_problem, counted
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError, did_you_mean, nearest

_REMEDY = "Expected: FOLDER/<class>/<image>, or FOLDER/train/<class>/<image> with test/ and optionally val/ next to it."
_OWN_FILE = re.compile(rf"split_.*\.json|{re.escape(NAMES_JSON)}|{re.escape(NAMES_TEXT)}")
#: Image file names by class folder.
Listing = dict[str, list[str]]


def read_folder(card: Card, base: Path, report: Report) -> SplitLists:
    """Read class folders: those in the card's options, or a folder of the user in one of two layouts.

    *Automatic split*: one folder of images per class. The files of a class, sorted by name, are shuffled by a generator
    seeded with the class name and cut into train (half), val (a fifth) and test (the rest). Counts are rounded half to
    even, with at least one training and one test image; 5 images give 2, 1 and 2. The cut depends only on the file
    names of the class: not on seeds, other classes or the order of a listing.

    *Given split*: ``train/`` and ``test/``, and optionally ``val/``, each with one folder per class.

    Class names are the folder names, with underscores, unless the card names the classes, or a file in a folder of the
    user does (:func:`~vlprompt.datasets.readers.names.names_of`); names do not change the cut or the order. Folders and
    files are sorted by their UTF-8 bytes (folders by numeric value if ``sort`` is ``int``), independent of the file
    system.

    Raises:
        DataError: If nothing can be read; other problems are added to ``report``.
    """
    options = card.options
    assert isinstance(options, FolderOptions)
    if options.splits:
        return _read_splits(card, options, base, report)
    report.remedy = _REMEDY
    folders = list_folders(base)
    # A folder called train may also be a class (railways): then it holds images, not folders.
    is_cut = "train" in folders and bool(list_folders(base / "train"))
    if is_cut and ("test" in folders or "val" in folders):
        return _read_cut(card, base, folders, report)
    if not folders:
        loose = len([name for name in _visible(base) if is_image(name)])
        content = f"{counted(loose, 'image')} but no class folders" if loose else "no class folders"
        raise DataError(f"Folder {base} holds {content}.\n{_REMEDY}")
    if is_cut:
        raise DataError(f"Folder {base} holds train/ but no test/.{_near('test', folders)}\n{_REMEDY}")
    _pass_loose(base, "", report, own=True)
    images = list_classes(base, folders, report, "", os.path.realpath(base))
    for name, files in images.items():
        if len(files) == 1:
            report.error("S17", f"class {name!r} has 1 image; at least 2 are needed, one to train and one to test")
    kept = read_kept(Path(card.kept)) if card.kept else {}
    lists: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for label, (name, files) in enumerate(images.items()):
        if len(files) > 1:
            known = {file: kept[f"{name}/{file}"] for file in files if f"{name}/{file}" in kept}
            for split, members in cut_class(name, files, known).items():
                lists[split] += samples(base, name, members, label)
                if not members and split != "val":
                    report.error("S17", f"class {name!r} has no {split} images left of the split in {card.kept}")
    if card.kept:
        _report_changes(card, kept, [f"{name}/{file}" for name, files in images.items() for file in files], report)
    names = names_of(base, list(images), report)
    check_names(names, report, card)
    return SplitLists(names, lists["train"], lists["val"], lists["test"], sampler="sorted-v1")


def cut_class(name: str, files: list[str], kept: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Cut the files of class ``name`` into train, val and test as in :func:`read_folder`; each list is sorted.

    Args:
        name: The class.
        files: Its file names.
        kept: The splits that files already have. Each other file joins the split that lacks most files.
    """
    order = sorted(files, key=os.fsencode)
    random.Random(f"vlprompt folder cut 1: {name}").shuffle(order)
    train = max(1, min(round(0.5 * len(order)), len(order) - 1))
    val = max(0, min(round(0.2 * len(order)), len(order) - train - 1))
    sizes = {"train": train, "val": val, "test": len(order) - train - val}
    splits = {split: [file for file in order if (kept or {}).get(file) == split] for split in SPLITS}
    for file in order:
        if file not in (kept or {}):
            if kept:
                joined = max(SPLITS, key=lambda split: sizes[split] - len(splits[split]))
            else:
                joined = next(split for split in SPLITS if len(splits[split]) < sizes[split])
            splits[joined].append(file)
    return {split: sorted(members, key=os.fsencode) for split, members in splits.items()}


def _report_changes(card: Card, kept: Mapping[str, str], present: list[str], report: Report) -> None:
    """Warn of images that were added to the folder, or removed from it, since its split was kept."""
    added, gone = len(set(present) - set(kept)), len(set(kept) - set(present))
    if added:
        report.warn("S14", f"{counted(added, 'image')} more than the split in {card.kept} has; they join it")
    if gone:
        report.warn("S14", f"{counted(gone, 'image')} of the split in {card.kept} are not there any more")


def _read_cut(card: Card, base: Path, folders: list[str], report: Report) -> SplitLists:
    report.errors("S02", [f"{name}/ is neither train/, val/ nor test/" for name in folders if name not in SPLITS])
    if "test" not in folders:
        report.error("S02", f"test/ is missing.{_near('test', folders)}")
    listings: dict[str, Listing] = {}
    _pass_loose(base, "", report, own=True)
    for split in (split for split in SPLITS if split in folders):
        _pass_loose(base / split, f"{split}/", report)
        # The user may have made a split folder a link: its target counts as inside.
        roots = os.path.realpath(base), os.path.realpath(base / split)
        inside = list_folders(base / split)
        listings[split] = list_classes(
            base / split, inside, report, f"{split}/: ", *roots, may_be_empty=split != "train"
        )
        if not listings[split]:
            report.error("S15", f"{split}/ holds no class folders with images")
    names = list(listings["train"])
    for split in ("val", "test"):
        for name in listings.get(split, {}):
            if name not in listings["train"]:
                report.error("S20", f"{split}/: class {name!r} is not in train/.{did_you_mean(name, names)}")
    if untested := [name for name in names if not listings.get("test", {}).get(name)]:
        report.warn("S17", f"{counted(len(untested), 'class')} without test images: {', '.join(untested[:5])}")
    label = {name: index for index, name in enumerate(names)}
    names = names_of(base, names, report)
    check_names(names, report, card)
    lists = {
        split: [
            sample
            for name, files in listings.get(split, {}).items()
            for sample in samples(base, f"{split}/{name}", files, label.get(name, 0))
        ]
        for split in SPLITS
    }
    return SplitLists(names, lists["train"], lists["val"], lists["test"], sampler="sorted-v1")


# -- layouts of cards -------------------------------------------------------------------------------------------------
def _read_splits(card: Card, options: FolderOptions, base: Path, report: Report) -> SplitLists:
    images = resolve(base, options.image_dir, folder=True)
    listed: dict[str, tuple[str, Listing]] = {}  # by folder: its domain and its classes
    of_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, patterns in options.splits.items():
        for pattern in patterns:
            for domain, folder in _folders(card, pattern):
                of_split[split].append(folder)
                if folder not in listed:
                    listed[folder] = domain, _list_split(card, base, images, folder, report)
    label = _labels(card, options, [listing for _, listing in listed.values()], report)
    names = list(dict.fromkeys(label))
    lists: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    excluded = set(card.excluded)
    for split, folders in of_split.items():
        for folder in folders:
            domain, listing = listed[folder]
            place = "" if folder == "." else f"{folder}/"
            for name in sorted(listing, key=lambda name: label.get(name, 0)):
                if name in label:
                    members = samples(images, place + name, listing[name], label[name], domain)
                    lists[split] += [sample for sample in members if sample.id not in excluded]
    shared = bool(of_split["val"]) and of_split["val"] == of_split["test"]
    split_lists = SplitLists(
        _class_names(card, options, names, report), lists["train"], lists["val"], lists["test"],
        sampler="sorted-v1", sample_val=not shared,
    )  # fmt: skip
    if not report.failed:
        compare_with_card(card, split_lists, report)
    return split_lists


def _folders(card: Card, pattern: str) -> list[tuple[str, str]]:
    """Return the domains and folders that a pattern of the card stands for."""
    if "{domain}" not in pattern:
        return [("", pattern)]
    return [(domain, pattern.replace("{domain}", folder)) for domain, folder in card.domains.items()]


def _list_split(card: Card, base: Path, images: Path, folder: str, report: Report) -> Listing:
    options = card.options
    assert isinstance(options, FolderOptions)
    path = resolve(images, folder, folder=True)
    if not path.is_dir():
        if not images.is_dir() or not card.domains:
            raise DataError(missing_text(card, base, f"{path} (does not exist)"))
        report.error("S15", f"folder {folder}/ is missing under {images}")
        return {}
    folders = [name for name in list_folders(path) if name not in options.ignore]
    if not folders and any(name.startswith("ILSVRC2012_val_") for name in os.listdir(path)):
        raise DataError(
            f"The images in {path} are not sorted into class folders; expected one folder per class (n01440764/ ...). "
            "Sort them with the labels of the ILSVRC development kit; links are accepted."
        )
    roots = os.path.realpath(path), os.path.realpath(base)
    # A published data set has lists and documents there.
    _pass_loose(path, "" if folder == "." else f"{folder}/", report, only_images=True)
    where = "" if folder == "." else f"{folder}/: "
    return list_classes(path, folders, report, where, *roots, ignore=options.ignore)


def _labels(card: Card, options: FolderOptions, listings: Sequence[Listing], report: Report) -> dict[str, int]:
    """Return labels by class folder, over all folders together: a domain may lack a class."""
    order: Callable[[str], object] = (lambda name: int(name)) if options.sort == "int" else os.fsencode
    present = dict.fromkeys(name for listing in listings for name in listing)
    if options.sort == "int":
        odd = [name for name in present if not (name.isascii() and name.isdigit())]
        report.errors("S20", [f"class folder {name}/ is not a number" for name in odd])
        present = dict.fromkeys(name for name in present if name not in odd)
    expected = card.classes.keys
    if card.classes.names_from == "wnids" and options.sort == "bytes":
        expected = expected or tuple(imagenet_names())
    if expected:
        report.errors(
            "S20",
            [
                f"class folder {name}/ is not expected.{did_you_mean(name, expected)}"
                for name in present
                if name not in expected
            ],
        )
        report.errors("S20", [f"class folder {name}/ is missing" for name in expected if name not in present])
        return {name: label for label, name in enumerate(expected)}
    if not card.domains:
        for index, listing in enumerate(listings[1:], 1):
            unlike = sorted(set(listing) ^ set(listings[0]))
            report.errors("S20", [f"class folder {name}/ is missing in some splits" for name in unlike if index])
    return {name: label for label, name in enumerate(sorted(present, key=order))}  # type: ignore[arg-type]


def _class_names(card: Card, options: FolderOptions, folders: list[str], report: Report) -> list[str]:
    facts: Classes = card.classes
    if facts.names_from in ("wnids", "list"):
        names = stated_class_names(card) or []
        if len(folders) != len(names):
            report.error("S20", f"{len(folders):,} class folders; {len(names):,} are expected")
        return names
    return [name.lower() for name in folders] if options.lower else folders


# -- listing ----------------------------------------------------------------------------------------------------------
def samples(base: Path, folder: str, files: list[str], label: int, domain: str = "") -> list[Sample]:
    """Return the samples of ``files`` in ``base/folder``, with ids relative to ``base``."""
    return [Sample(f"{folder}/{file}", label, FileSource(os.path.join(base, folder, file)), domain) for file in files]


def list_folders(path: Path) -> list[str]:
    """Return the sub-folders of ``path``, sorted by UTF-8 bytes, without names that begin with a dot."""
    return [name for name in _visible(path) if os.path.isdir(path / name)]


def _pass_loose(path: Path, where: str, report: Report, *, own: bool = False, only_images: bool = False) -> None:
    """Count the files next to the class folders; ``own``: without the files that vlprompt reads or writes there."""
    for entry in os.scandir(path):
        if entry.is_dir() or (own and _OWN_FILE.fullmatch(entry.name)):
            continue
        if is_image(entry.name) and not entry.name.startswith("."):
            report.passed.add(where + entry.name, "images outside the class folders")
        elif not only_images:
            report.passed.add(where + entry.name)


def list_classes(
    path: Path,
    folders: list[str],
    report: Report,
    where: str,
    *real_roots: str,
    ignore: Sequence[str] = (),
    may_be_empty: bool = False,
) -> Listing:
    """Return the image file names of each class folder, sorted by UTF-8 bytes.

    Args:
        path: The folder of the class folders.
        folders: Names of the class folders.
        report: Collects the problems.
        where: Prefix of each problem's text.
        real_roots: Resolved folders that links must not leave.
        ignore: File names to skip.
        may_be_empty: Whether a class folder without images is no problem.
    """
    images: Listing = {}
    for name in folders:
        problem = class_name_problem(name) or _unicode_problem(name)
        if problem:
            report.error("S09", where + problem)
            continue
        inside, links, others = [], 0, []
        if not _reached(path / name, real_roots):
            report.error("S05", f"{where}{name}/ is a link to a place outside {path}")
            continue
        for entry in sorted(os.scandir(path / name), key=lambda entry: os.fsencode(entry.name)):
            if entry.name in ignore:
                continue
            if entry.name.startswith("."):
                report.passed.add(entry.name)
            elif entry.is_symlink() and not _reached(entry.path, real_roots):
                links += 1
            elif is_image(entry.name) and entry.is_file():
                inside.append(entry.name)
            elif entry.is_dir():
                others.append(entry.name + "/")
            elif is_image(entry.name):
                report.passed.add(f"{where}{name}/{entry.name}", "neither a file nor a link to one")
            else:
                report.passed.add(f"{where}{name}/{entry.name}")
        report.errors("S04", [where + text for text in (_unicode_problem(file) for file in inside) if text])
        if links:
            report.error("S05", f"{where}{name}/ has {counted(links, 'link')} to places outside {path}")
        if others:
            shown = ", ".join(others[:3])
            report.error(
                "S15", f"{where}{name}/ holds folders ({shown}); images must be directly in their class folder"
            )
        elif not inside and not links and not may_be_empty:
            report.error("S15", f"{where}{name}/ holds no images ({', '.join(IMAGE_SUFFIXES)})")
        images[name] = inside
    return images


def _reached(path: str | Path, real_roots: Sequence[str]) -> bool:
    return links_allowed() or any(is_inside(path, root) for root in real_roots)


def _visible(path: Path) -> list[str]:
    return sorted((name for name in os.listdir(path) if not name.startswith(".")), key=os.fsencode)


def _unicode_problem(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the name {os.fsencode(name)!r} is not valid UTF-8"
    return None


def _near(word: str, folders: list[str]) -> str:
    similar = [name for name in nearest(word, folders) if name != "train"]
    return f" Should {similar[0]}/ be called {word}/?" if similar else ""
