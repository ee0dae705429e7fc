"""Reader of FGVC-Aircraft's variant lists."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.data.cards import Card
from vlprompt.data.images import FileSource
from vlprompt.data.paths import check_files, path_problem
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.readers.split_json import refuse_links, refuse_missing
from vlprompt.data.records import SPLITS, Sample, SplitLists, class_name_problem, refuse
from vlprompt.errors import DataError, did_you_mean


def read_fgvc(card: Card, base: Path) -> SplitLists:
    """Read ``variants.txt`` (a class name per line, in label order) and ``images_variant_{train,val,test}.txt``.

    A line of a list is the image's number, one space, and the class name, which may hold spaces and slashes.

    Raises:
        DataError: If a file or an image is missing or a line cannot be understood; all problems are listed.
    """
    remedy = f"Fetch the archive again: {card.home}"
    variants = _lines(card, base, "variants.txt")
    names = [name for _, name in variants]
    problems = [f"variants.txt:{number}: {text}" for number, name in variants if (text := class_name_problem(name))]
    problems += [f"variants.txt: {name!r} appears twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if card.classes is not None and len(names) != card.classes:
        problems.append(f"variants.txt has {len(names)} names; {card.classes} are expected")
    refuse(f"The class list in {base} cannot be used", problems, remedy)
    label = {name: index for index, name in enumerate(names)}
    folder = base / card.image_dir
    lists: dict[str, list[Sample]] = {}
    owner: dict[str, str] = {}
    for split in SPLITS:
        file = f"images_variant_{split}.txt"
        lists[split] = []
        for number, line in _lines(card, base, file):
            image, _, name = line.partition(" ")
            entry, where = f"{image}.jpg", f"{file}:{number}"
            if name not in label:
                problems.append(f"{where}: unknown class {name!r}.{did_you_mean(name, names)}")
            elif text := path_problem(entry):
                problems.append(f"{where}: {text}")
            elif entry in owner:
                problems.append(f"{where}: {entry} is already in {owner[entry]}")
            else:
                owner[entry] = file
                lists[split].append(Sample(entry, label[name], FileSource(os.path.join(folder, entry))))
        if not lists[split] and split != "val":
            problems.append(f"{file} lists no images")
    absent = set(range(len(names))) - {sample.label for sample in lists["train"]}
    problems += [f"class {names[index]!r} has no training image" for index in sorted(absent)]
    refuse(f"The image lists in {base} cannot be used", problems, remedy)
    missing, outside = check_files(folder, owner)
    refuse_links(outside, folder)
    refuse_missing(missing, len(owner), folder, card)
    return SplitLists(names, lists["train"], lists["val"], lists["test"])


def _lines(card: Card, base: Path, name: str) -> list[tuple[int, str]]:
    """Return the numbered lines of a list, blank ones left out."""
    path = base / name
    if not path.is_file():
        raise DataError(missing_text(card, base, f"{path} (does not exist)"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"List {path} cannot be read: {error}.") from error
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
