"""Data of the user: a card and a split file for a folder of images, and local splits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vlprompt._files import home_path, sha256_text, write_text
from vlprompt.config.yaml import yaml_text
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.catalogue import find_card, list_datasets, user_card_folder
from vlprompt.datasets.kept_split import split_text
from vlprompt.datasets.options import FolderOptions
from vlprompt.datasets.paths import resolve
from vlprompt.datasets.readers import new_report
from vlprompt.datasets.readers.folder import cut_class, list_classes, list_folders, read_folder
from vlprompt.datasets.records import SPLITS, SplitLists
from vlprompt.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def new_card(name: str, folder: str | Path, template: str = "a photo of a {}.") -> tuple[Path, Path, SplitLists]:
    """Write a card and a split file for a folder of class folders.

    The card is written to the user's card folder (:func:`~vlprompt.datasets.catalogue.user_card_folder`), the split
    file to the folder of images. Images are not moved or changed. The split is that of the ``folder`` data set.

    Args:
        name: The data set's name.
        folder: The folder of images, in either layout of the ``folder`` data set.
        template: The prompt.

    Returns:
        The card's file, the split file, and the lists that were read.

    Raises:
        ConfigError: If the name is used or not valid, the template lacks ``{}``, or a file exists.
        DataError: If the folder cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"the name {name!r} is not valid; accepted: up to 64 letters, digits, - and _")
    if name.lower() in map(str.lower, list_datasets()) or _is_known(name):
        raise ConfigError(f"a data set {name!r} exists already; choose another name")
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ConfigError(f"--template is {template!r}; it must contain {{}} exactly once, for the class name")
    base = Path(os.path.abspath(home_path(folder)))
    lists = _read(base)
    split_file, card_file = base / f"split_{name}.json", user_card_folder() / f"{name}.yaml"
    for path in (split_file, card_file):
        if path.exists():
            raise ConfigError(f"{path} exists; choose another name, or move the file away")
    write_file(split_file, split_text(lists))
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


def local_split(card: Card, root: str | Path | None = None) -> Path:
    """Write a local split file for a data set whose published split file is not available.

    The class folders under the image folder are cut 50/20/30 like the ``folder`` data set. The file is named
    ``split_local_<hash>.json`` and never replaces the published one; results on it are marked as not published.

    Returns:
        The file, in the data set's folder; use it with ``--data.split NAME``.

    Raises:
        DataError: If there are no class folders, or they cannot be used.
        ConfigError: If the data set is multi-label, has domains, or is packaged.
    """
    if card.multilabel or card.domains or card.packaged:
        raise ConfigError(f"a local split is made from class folders, which {card.name} does not have")
    base = card.base(root)
    images = resolve(base, getattr(card.options, "image_dir", "."), folder=True)
    if not images.is_dir():
        raise DataError(f"The image folder {images} does not exist.\nSee: vlprompt data show {card.name}")
    report = new_report(card, base)
    folders = list_folders(images)
    names = dict(zip(card.classes.keys, card.classes.names, strict=False))
    listing = list_classes(images, folders, report, "", os.path.realpath(images))
    if not listing:
        report.error("S15", f"{images} has no class folders")
    report.finish()
    content: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for label, (folder, files) in enumerate((name, files) for name, files in listing.items() if len(files) > 1):
        for split, members in cut_class(folder, files).items():
            content[split] += [[f"{folder}/{file}", label, names.get(folder, folder)] for file in members]
    text = json.dumps(content, indent=4) + "\n"
    path = base / f"split_local_{sha256_text(text)[:8]}.json"
    write_file(path, text)
    return path


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically.

    Raises:
        DataError: If it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
