"""Reader of ImageNet's class folders."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.data.cards import Card, card_class_names
from vlprompt.data.readers.folder import list_classes, list_folders, samples
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.records import Sample, SplitLists, refuse
from vlprompt.errors import DataError


def read_imagenet(card: Card, base: Path) -> SplitLists:
    """Read ``images/train/<wnid>/*`` and ``images/val/<wnid>/*``; the validation images are both val and test.

    Labels are positions among the 1,000 byte-sorted wnids. Files are sorted by name, so that a selection does not
    depend on the file system (CoOp's does).

    Raises:
        DataError: If a folder is missing, the validation images lie flat, or the classes are not the expected 1,000.
    """
    names = card_class_names(card) or []
    images = base / card.image_dir
    found: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "val"):
        path = images / split
        if not path.is_dir():
            raise DataError(missing_text(card, base, f"{path} (does not exist)"))
        folders = list_folders(path)
        if not folders and any(name.startswith("ILSVRC2012_val_") for name in os.listdir(path)):
            raise DataError(
                f"The images in {path} lie flat; expected one folder per class (n01440764/ ...). Sort them with the "
                "labels of the ILSVRC development kit; links will do."
            )
        found[split], problems = list_classes(path, folders, os.path.realpath(path), os.path.realpath(base))
        if len(folders) != len(names):
            problems.append(f"{len(folders):,} class folders; {len(names):,} are expected")
        refuse(f"Folder {path} cannot be used", problems, f"Is the archive fully unpacked? {card.notes.strip()}")
    unlike = sorted(set(found["train"]) ^ set(found["val"]))
    refuse(
        f"train/ and val/ under {images} hold different classes",
        [f"{wnid}/ is only in {'train' if wnid in found['train'] else 'val'}/" for wnid in unlike],
        card.notes.strip(),
    )
    lists: dict[str, list[Sample]] = {"train": [], "val": []}
    for split, classes in found.items():
        for label, (wnid, files) in enumerate(classes.items()):
            lists[split] += samples(images, f"{split}/{wnid}", files, label)
    val = lists["val"]
    return SplitLists(names, lists["train"], val, list(val), sampler="sorted-v1", sample_val=False)
