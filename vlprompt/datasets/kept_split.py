"""Kept splits: the split of a folder of images, as the run that used it recorded it.

The file has the form of CoOp's split files. Images that are added to the folder later join the kept split
(:func:`vlprompt.datasets.readers.folder.cut_class`), and none of its images moves.
"""

from __future__ import annotations

import json
from pathlib import Path

from vlprompt._files import parse_json, read_text
from vlprompt.datasets.paths import path_problem
from vlprompt.datasets.records import SPLITS, SplitLists, labels_of
from vlprompt.errors import DataError

#: Name of the file in a run folder.
KEPT_SPLIT = "split.json"
_LARGEST_FILE = 256 * 2**20


def split_text(lists: SplitLists) -> str:
    """Return ``lists`` as the JSON text of a split file; an image has one label."""
    content = {
        split: [[sample.id, sample.label, lists.class_names[labels_of(sample)[0]]] for sample in getattr(lists, split)]
        for split in SPLITS
    }
    return json.dumps(content, indent=4) + "\n"


def read_kept(path: Path) -> dict[str, str]:
    """Return the part (``train``, ``val`` or ``test``) of every image id in the kept split ``path``.

    Raises:
        DataError: It cannot be read, or is not a split file.
    """
    try:
        content = parse_json(read_text(path, _LARGEST_FILE))
    except (OSError, ValueError) as error:
        raise DataError(f"The kept split {path} cannot be read: {str(error)[:200]}.") from error
    parts = [content.get(split) if isinstance(content, dict) else None for split in SPLITS]
    kept: dict[str, str] = {}
    for split, items in zip(SPLITS, parts, strict=True):
        for item in items if isinstance(items, list) else [None]:
            if not isinstance(item, list) or len(item) != 3 or path_problem(item[0]):
                raise DataError(f"The kept split {path} is damaged: {split} is not a list of [path, label, name].")
            if (other := kept.setdefault(item[0], split)) != split:
                raise DataError(f"The kept split {path} is damaged: {item[0][:100]!r} is in {other} and in {split}.")
    return kept
