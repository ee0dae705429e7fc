"""Reader of image lists: text lines, one file per class, COCO annotations, JSON lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._files import parse_json, read_text
from vlprompt.datasets.card import Card, stated_class_names
from vlprompt.datasets.options import ListFileOptions
from vlprompt.datasets.paths import path_problem, resolve
from vlprompt.datasets.readers.checks import check_duplicates, check_names
from vlprompt.datasets.readers.images import find_images
from vlprompt.datasets.readers.missing import missing_text, remark
from vlprompt.datasets.readers.published import compare_with_card
from vlprompt.datasets.records import SPLITS, Label, Sample, SplitLists, class_name_problem
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError, did_you_mean

#: COCO's annotations of 82,783 training images take about 300 MB.
_LARGEST_FILE = 2**30


@dataclass(frozen=True)
class Row:
    """An image of a list: its place in the list, its path, its label or labels, and its domain."""

    where: str
    path: str
    label: Label
    domain: str = ""


def read_list_file(card: Card, base: Path, report: Report) -> SplitLists:
    """Read the lists of ``card`` under ``base`` and find the images.

    Raises:
        DataError: If a list is missing or nothing can be read; other problems are added to ``report``.
    """
    options = card.options
    assert isinstance(options, ListFileOptions)
    names, keys = _classes(card, options, base, report)
    rows = {split: list(_rows(card, options, base, split, keys, report)) for split in SPLITS}
    for split in options.splits:
        if not rows[split] and split != "val":
            report.error("S02", f"the lists of {split} ({', '.join(options.splits[split])}) name no images")
    check_duplicates({split: [row.path for row in rows[split]] for split in SPLITS}, card.same_images, report)
    entries = dict.fromkeys(row.path for split in SPLITS for row in rows[split])
    if not entries:
        report.stop()
    sources = find_images(card, base, list(entries), report)
    excluded = set(card.excluded)
    samples = {
        split: [
            Sample(row.path, row.label, sources[row.path], row.domain)
            for row in rows[split]
            if row.path in sources and row.path not in excluded
        ]
        for split in SPLITS
    }
    lists = SplitLists(names, samples["train"], samples["val"], samples["test"])
    if "train" in options.splits:
        trained = {label for row in rows["train"] for label in _label_tuple(row.label)}
        absent = [name for label, name in enumerate(names) if label not in trained]
        report.errors("S07", [f"class {name!r} has no training image" for name in absent])
    if not report.failed:
        compare_with_card(card, lists, report)
    return lists


def _label_tuple(label: Label) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def _classes(card: Card, options: ListFileOptions, base: Path, report: Report) -> tuple[list[str], dict[str, int]]:
    """Return the class names by label, and the labels by the keys that the files use."""
    if options.names_file is not None:
        numbered = list(_lines(card, base, options.names_file, report))
        names = [name for _, name in numbered]
        report.errors(
            "S09", [f"{options.names_file}:{at}: {text}" for at, name in numbered if (text := class_name_problem(name))]
        )
        report.errors(
            "S09",
            [
                f"{options.names_file}: {name!r} appears twice"
                for name in sorted({n for n in names if names.count(n) > 1})
            ],
        )
        if names and card.classes.count not in (None, len(names)):
            text = f"{options.names_file} has {len(names):,} names; {card.name} has {card.classes.count:,} classes"
            report.error("S20", text)
            report.stop()
    else:
        names = stated_class_names(card) or []
    check_names(names, report, card)
    if not names:
        report.error("S20", f"there are no class names on the card or in {options.names_file or 'a list of names'}")
        report.stop()
    keys = card.classes.keys or tuple(names)
    return names, {key: label for label, key in enumerate(keys)}


# -- files ------------------------------------------------------------------------------------------------------------
def _open(card: Card, base: Path, name: str, report: Report) -> str:
    path = resolve(base, name)
    if not path.is_file():
        raise DataError(missing_text(card, base, f"{path} ({remark(path)})"))
    try:
        return read_text(path, _LARGEST_FILE, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        report.error("S01", f"list {path} cannot be read: {error}")
        report.stop()


def _lines(card: Card, base: Path, name: str, report: Report) -> Iterator[tuple[int, str]]:
    """Yield the lines of a list with their numbers, without blank lines."""
    for number, line in enumerate(_open(card, base, name, report).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _rows(
    card: Card, options: ListFileOptions, base: Path, split: str, keys: dict[str, int], report: Report
) -> Iterator[Row]:
    """Yield the usable rows of a split; problems are added to ``report``."""
    rows: list[Row] = []
    for pattern in options.splits.get(split, ()):
        if options.format == "per_class":
            rows += _per_class(card, base, pattern, keys, report)
        elif options.format == "coco":
            rows += _coco(card, base, pattern, keys, report)
        else:
            rows += _listed(card, options, base, pattern, keys, report)
    place = options.folders.get(split, "")
    for row in rows:
        path = f"{place}/{row.path}{options.suffix}" if place else row.path + options.suffix
        if problem := path_problem(path):
            report.error("S04", f"{row.where}: {problem}")
        else:
            yield Row(row.where, path, row.label, row.domain)


def _listed(
    card: Card, options: ListFileOptions, base: Path, pattern: str, keys: dict[str, int], report: Report
) -> Iterator[Row]:
    domains = list(card.domains.items()) if "{domain}" in pattern else [("", "")]
    for domain, domain_key in domains:
        name = pattern.replace("{domain}", domain_key)
        for number, line in _lines(card, base, name, report):
            where = f"{name}:{number}"
            pair = _object(line, options) if options.format == "jsonl" else _words(line, options)
            if isinstance(pair, str):
                report.error("S03", f"{where}: {pair}")
                continue
            path, value = pair
            label = _label(value, options, keys)
            if isinstance(label, str):
                report.error("S06" if options.label == "number" else "S20", f"{where}: {label}")
                continue
            yield Row(where, path, label, domain)


def _words(line: str, options: ListFileOptions) -> tuple[str, str] | str:
    """Return path and label text of a line, or the problem."""
    if options.label == "folder":
        return line, line.partition("/")[0]
    if options.label == "name":  # a class name may contain spaces, an image path does not
        path, _, label = line.partition(" ")
    else:
        path, _, label = line.rpartition(" ")
    path, label = path.strip(), label.strip()
    return (path, label) if path and label else f"expected an image, a space and its {options.label}, got {line[:80]!r}"


def _object(line: str, options: ListFileOptions) -> tuple[str, Any] | str:
    try:
        entry = parse_json(line)
    except ValueError as error:
        return f"not valid JSON: {str(error)[:80]}"
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get(options.image_key), str)
        or options.label_key not in entry
    ):
        return f"expected an object with {options.image_key!r} and {options.label_key!r}"
    return entry[options.image_key], entry[options.label_key]


def _label(value: Any, options: ListFileOptions, keys: dict[str, int]) -> int | str:
    """Return the label of a line's label text, or the problem."""
    if options.label != "number":
        if isinstance(value, str) and value in keys:
            return keys[value]
        return f"unknown class {str(value)[:80]!r}.{did_you_mean(str(value)[:80], keys)}"
    text = str(value)
    if isinstance(value, (bool, float)) or not (text.isascii() and text.isdigit() and len(text) < 7):
        return f"label {text[:40]!r}; whole numbers from {options.first_label} are expected"
    label = int(text) - options.first_label
    if not 0 <= label < len(keys):
        return (
            f"label {text} is out of range; {options.first_label} to {len(keys) - 1 + options.first_label} are expected"
        )
    return label


def _per_class(card: Card, base: Path, pattern: str, keys: dict[str, int], report: Report) -> list[Row]:
    """Read lines ``000012 -1`` from one file per class: an image has the labels of the files that mark it with 1.

    Images without a label are kept, as negatives of all classes; 0 means "difficult" and counts as no label.
    """
    labels: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    for key, label in keys.items():
        name = pattern.replace("{class}", key)
        for number, line in _lines(card, base, name, report):
            fields = line.split()
            if len(fields) != 2 or fields[1] not in ("1", "0", "-1"):
                report.error("S03", f"{name}:{number}: expected an image and 1, 0 or -1, got {line[:80]!r}")
                continue
            first.setdefault(fields[0], f"{name}:{number}")
            labels.setdefault(fields[0], []).extend([label] if fields[1] == "1" else [])
    return [Row(first[image], image, tuple(sorted(members))) for image, members in labels.items()]


def _coco(card: Card, base: Path, name: str, keys: dict[str, int], report: Report) -> list[Row]:
    """Read instance annotations: an image has the labels of all its boxes, including crowds, in file order."""
    try:
        content = parse_json(_open(card, base, name, report))
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        boxes = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        unknown = [category for category in categories.values() if category not in keys]
        hash(tuple(boxes))  # TypeError if an id is a list
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        report.error(
            "S01", f"{name} does not hold COCO's instance annotations: {type(error).__name__}: {str(error)[:100]}"
        )
        report.stop()
    texts = [f"{name}: unknown category {category!r}.{did_you_mean(str(category), keys)}" for category in unknown]
    report.errors("S20", texts)
    if unknown:
        report.stop()
    for image, file in files.items():
        if problem := path_problem(file):
            report.error("S04", f"{name}: image {str(image)[:40]!r}: {problem}")
    for key in ("categories", "images"):
        ids = [entry["id"] for entry in content[key]]
        twice = [one for one, number in Counter(ids).items() if number > 1]
        report.errors("S11", [f"{name}: the id {str(one)[:40]!r} of {key} is given twice" for one in twice])
    if report.failed:
        report.stop()
    labels: dict[Any, set[int]] = {image: set() for image in files}
    for image, category in boxes:
        if image not in labels or category not in categories:
            report.error(
                "S07", f"{name}: an annotation of image {image!r} and category {category!r}, one of which is unknown"
            )
            continue
        labels[image].add(keys[categories[category]])
    return [
        Row(f"{name}: image {image!r}", files[image], tuple(sorted(members))) for image, members in labels.items()
    ]
