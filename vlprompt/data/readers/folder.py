"""Reader of a user's own folder of class folders."""

from __future__ import annotations

import os
import random
from pathlib import Path

from vlprompt.data.cards import Card
from vlprompt.data.images import IMAGE_SUFFIXES, FileSource
from vlprompt.data.paths import is_inside
from vlprompt.data.records import SPLITS, Sample, SplitLists, class_name_problem, counted, refuse
from vlprompt.errors import DataError, did_you_mean, nearest

_REMEDY = "Expected: FOLDER/<class>/<image>, or FOLDER/train/<class>/<image> with test/ and, if wanted, val/ beside it."


def read_folder(card: Card, base: Path) -> SplitLists:
    """Read ``base``, in either of two layouts.

    *Cut for you*: one folder of images per class. The files of a class, sorted by name, are shuffled by a generator
    seeded with the class name alone and cut into train (half), val (a fifth) and test (the rest), numbers rounded
    half to even, with at least one training and one test image whatever the rounding says; 5 images give 2, 1 and 2.
    The cut depends on the file names of that class only: not on seeds, other classes or the order of a listing.

    *Cut by you*: ``train/`` and ``test/``, and optionally ``val/``, each with one folder per class.

    Class names are the folder names, underscores kept, sorted by their UTF-8 bytes. Lists are in sorted order.

    Raises:
        DataError: If the folder has neither layout, or a class has too few images; all problems are listed.
    """
    real_root = os.path.realpath(base)
    folders = list_folders(base)
    # A folder called train may also be a class of railway pictures: then it holds images, not folders.
    is_cut = "train" in folders and bool(list_folders(base / "train"))
    if is_cut and ("test" in folders or "val" in folders):
        return _read_cut(base, folders, real_root)
    if not folders:
        loose = len([name for name in _visible(base) if is_image(name)])
        found = f"{counted(loose, 'image')} but no class folders" if loose else "no class folders"
        raise DataError(f"Folder {base} holds {found}.\n{_REMEDY}")
    if is_cut:
        raise DataError(f"Folder {base} holds train/ but no test/.{_near('test', folders)}\n{_REMEDY}")
    images, problems = list_classes(base, folders, real_root)
    for name, files in images.items():
        if len(files) == 1:
            problems.append(f"class {name!r} has 1 image; at least 2 are needed, one to train and one to test")
    refuse(f"Folder {base} cannot be used", problems, _REMEDY)
    lists: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for label, (name, files) in enumerate(images.items()):
        for split, members in cut_class(name, files).items():
            lists[split] += samples(base, name, members, label)
    return SplitLists(list(images), lists["train"], lists["val"], lists["test"], sampler="sorted-v1")


def cut_class(name: str, files: list[str]) -> dict[str, list[str]]:
    """Cut the files of class ``name`` into train, val and test as :func:`read_folder` says; each part is sorted."""
    order = sorted(files, key=os.fsencode)
    random.Random(f"vlprompt folder cut 1: {name}").shuffle(order)
    train = max(1, min(round(0.5 * len(order)), len(order) - 1))
    val = max(0, min(round(0.2 * len(order)), len(order) - train - 1))
    parts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    return {split: sorted(members, key=os.fsencode) for split, members in parts.items()}


def _read_cut(base: Path, folders: list[str], real_root: str) -> SplitLists:
    problems = [f"{name}/ is neither train/, val/ nor test/" for name in folders if name not in SPLITS]
    if "test" not in folders:
        problems.append(f"test/ is missing.{_near('test', folders)}")
    found: dict[str, dict[str, list[str]]] = {}
    for split in (split for split in SPLITS if split in folders):
        real = os.path.realpath(base / split)  # a link made here by the user: what lies behind it counts as inside
        found[split], more = list_classes(base / split, list_folders(base / split), real_root, real)
        problems += [f"{split}/: {text}" for text in more]
        if not found[split]:
            problems.append(f"{split}/ holds no class folders with images")
    names = list(found["train"])
    for split in ("val", "test"):
        for name in found.get(split, {}):
            if name not in found["train"]:
                problems.append(f"{split}/: class {name!r} is not in train/.{did_you_mean(name, names)}")
    refuse(f"Folder {base} cannot be used", problems, _REMEDY)
    label = {name: index for index, name in enumerate(names)}
    lists = {
        split: [
            sample
            for name, files in found.get(split, {}).items()
            for sample in samples(base, f"{split}/{name}", files, label[name])
        ]
        for split in SPLITS
    }
    return SplitLists(names, lists["train"], lists["val"], lists["test"], sampler="sorted-v1")


def samples(base: Path, folder: str, files: list[str], label: int) -> list[Sample]:
    """Return the samples of ``files`` in ``base/folder``, with ids relative to ``base``."""
    return [Sample(f"{folder}/{file}", label, FileSource(os.path.join(base, folder, file))) for file in files]


def list_folders(path: Path) -> list[str]:
    """Return the sub-folders of ``path`` sorted by UTF-8 bytes; names that begin with a dot are left out."""
    return [name for name in _visible(path) if os.path.isdir(path / name)]


def list_classes(path: Path, folders: list[str], *real_roots: str) -> tuple[dict[str, list[str]], list[str]]:
    """List the images of each class folder, both sorted by UTF-8 bytes.

    Args:
        path: The folder that holds the class folders.
        folders: Their names.
        real_roots: Resolved folders out of which no link may lead.

    Returns:
        Image file names by class, and the problems found.
    """
    images: dict[str, list[str]] = {}
    problems = []
    for name in folders:
        problem = class_name_problem(name) or _unicode_problem(name)
        if problem:
            problems.append(problem)
            continue
        inside, links, others = [], 0, []
        if not any(is_inside(path / name, root) for root in real_roots):
            problems.append(f"{name}/ is a link to a place outside {path}")
            continue
        for entry in sorted(os.scandir(path / name), key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not any(is_inside(entry.path, root) for root in real_roots):
                links += 1
            elif is_image(entry.name) and entry.is_file():
                inside.append(entry.name)
            elif entry.is_dir():
                others.append(entry.name + "/")
        problems += [text for text in (_unicode_problem(file) for file in inside) if text]
        if links:
            problems.append(f"{name}/ has {counted(links, 'link')} to places outside {path}")
        if others:
            problems.append(
                f"{name}/ holds folders ({', '.join(others[:3])}); images lie directly in their class folder"
            )
        elif not inside and not links:
            problems.append(f"{name}/ holds no images ({', '.join(IMAGE_SUFFIXES)})")
        images[name] = inside
    return images, problems


def is_image(name: str) -> bool:
    """Return whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _visible(path: Path) -> list[str]:
    return sorted((name for name in os.listdir(path) if not name.startswith(".")), key=os.fsencode)


def _unicode_problem(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the name {os.fsencode(name)!r} is not valid UTF-8"
    return None


def _near(word: str, folders: list[str]) -> str:
    found = [name for name in nearest(word, folders) if name != "train"]
    return f" Should {found[0]}/ be called {word}/?" if found else ""
