"""A user's own data: a card and a split file from a folder of images, and a split made here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vlprompt._files import sha256_text, write_text
from vlprompt.config.yaml import yaml_text
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.catalogue import find_card, list_datasets, own_card_folder
from vlprompt.datasets.options import FolderOptions
from vlprompt.datasets.readers import new_report
from vlprompt.datasets.readers.folder import cut_class, list_classes, list_folders, read_folder
from vlprompt.datasets.records import SPLITS, SplitLists, labels_of
from vlprompt.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def new_card(name: str, folder: str | Path, template: str = "a photo of a {}.") -> tuple[Path, Path, SplitLists]:
    """Write a card and a split file for a folder of class folders.

    The card goes to the folder of the user's cards (:func:`~vlprompt.datasets.catalogue.own_card_folder`), the split
    file into the folder of images; nothing there is moved or changed. The cut is that of the ``folder`` data set.

    Args:
        name: The data set's name.
        folder: The folder of images, in either layout of the ``folder`` data set.
        template: The prompt.

    Returns:
        The card's file, the split file, and what was read.

    Raises:
        ConfigError: A name that is taken or not usable, a template without ``{}``, or files that are there already.
        DataError: The folder cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"the name {name!r} is not usable; accepted: up to 64 letters, digits, - and _")
    if name.lower() in map(str.lower, list_datasets()) or _is_known(name):
        raise ConfigError(f"there is a data set {name!r} already; choose another name, or remove its card")
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ConfigError(f"--template is {template!r}; it must hold {{}} exactly once, for the class name")
    base = Path(os.path.abspath(Path(folder).expanduser()))
    lists = _read(base)
    split_file, card_file = base / f"split_{name}.json", own_card_folder() / f"{name}.yaml"
    for path in (split_file, card_file):
        if path.exists():
            raise ConfigError(f"{path} is there already; remove it or choose another name")
    write_file(split_file, _split_text(lists))
    sizes = {split: len(getattr(lists, split)) for split in SPLITS}
    write_file(card_file, yaml_text({
        "schema": 1, "name": name, "task": "multiclass", "group": ["own"], "folders": ["."], "root": str(base),
        "reader": "split_json", "reader_options": {"split_file": split_file.name},
        "splits": {"own": {**sizes, "content_sha256": lists.content_sha256()}},
        "classes": {"count": len(lists.class_names), "names_from": "split"},
        "templates": {"single": template}, "metric": "accuracy", "licence": {"text": "your own"},
        "notes": f"Made by vlprompt data new from {base}.",
    }))  # fmt: skip
    return card_file, split_file, lists


def _is_known(name: str) -> bool:
    try:
        find_card(name)
    except ConfigError:
        return False
    return True


def _read(base: Path) -> SplitLists:
    if not base.is_dir():
        raise DataError(f"Folder {base} does not exist; give the folder that holds one folder of images per class.")
    card = Card("folder", "folder", FolderOptions(), Classes(names_from="folders"), Templates("{}"))
    report = new_report(card, base)
    lists = read_folder(card, base, report)
    report.finish()
    return lists


def own_split(card: Card, root: str | Path | None = None) -> Path:
    """Write a split of one's own for a data set whose published split file cannot be had.

    The class folders under the image folder are cut 50/20/30 as the ``folder`` data set is. The file is called
    ``split_local_<hash>.json`` and never takes the published one's place; results on it are marked as not published.

    Returns:
        The file, in the data set's folder; use it with ``--data.split NAME``.

    Raises:
        DataError: There are no class folders, or they cannot be used.
        ConfigError: The data set has several labels an image, or domains.
    """
    if card.multilabel or card.domains or card.packaged:
        raise ConfigError(f"a split of one's own is made from class folders, which {card.name} does not have")
    base = card.base(root)
    images = base / getattr(card.options, "image_dir", ".")
    if not images.is_dir():
        raise DataError(f"The image folder {images} does not exist.\nSee: vlprompt data show {card.name}")
    report = new_report(card, base)
    folders = list_folders(images)
    names = dict(zip(card.classes.keys, card.classes.names, strict=False))
    listing = list_classes(images, folders, report, "", os.path.realpath(images))
    if not listing:
        report.error("S15", f"{images} holds no class folders")
    report.finish()
    content: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for label, (folder, files) in enumerate((name, files) for name, files in listing.items() if len(files) > 1):
        for split, members in cut_class(folder, files).items():
            content[split] += [[f"{folder}/{file}", label, names.get(folder, folder)] for file in members]
    text = json.dumps(content, indent=4) + "\n"
    path = base / f"split_local_{sha256_text(text)[:8]}.json"
    write_file(path, text)
    return path


def _split_text(lists: SplitLists) -> str:
    content = {
        split: [[sample.id, sample.label, lists.class_names[labels_of(sample)[0]]] for sample in getattr(lists, split)]
        for split in SPLITS
    }
    return json.dumps(content, indent=4) + "\n"


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically.

    Raises:
        DataError: It cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
