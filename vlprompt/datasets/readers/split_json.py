"""Reader of CoOp's split files: ``{"train": [[path, label, name], ...], "val": [...], "test": [...]}``.

A split file is untrusted input. It is checked against :data:`vlprompt.datasets.report.RULES`, and checking continues
after a problem where possible, so that all problems are reported at once. In a data set with domains an item may have
four values, as in the files of Soft-Prompt-Generation: path, label, domain number, name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt._files import parse_json, read_bytes, sha256_bytes
from vlprompt.datasets.card import Card
from vlprompt.datasets.options import SplitJsonOptions
from vlprompt.datasets.paths import path_problem, resolve
from vlprompt.datasets.readers.checks import check_duplicates, check_names, label_problem
from vlprompt.datasets.readers.images import find_images
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.readers.published import compare_with_card
from vlprompt.datasets.records import SPLITS, Sample, SplitLists, class_name_problem
from vlprompt.datasets.report import Report
from vlprompt.datasets.variants import CORRUPTIONS, split_variant, variant_problem
from vlprompt.errors import DataError, did_you_mean

_LARGEST_FILE = 64 * 2**20


@dataclass(frozen=True)
class Item:
    """One item of a split file; unusable values are ``None``."""

    path: str | None
    label: int | None
    name: str | None
    domain: str = ""


Items = dict[str, list[Item]]


def read_split_json(card: Card, base: Path, report: Report) -> SplitLists:
    """Read the split file of ``card`` under ``base`` and find its images.

    A missing split file is never generated: the result would differ from the published split. A split whose size or
    content differs from the published one is accepted with a warning.

    Raises:
        DataError: If nothing can be read; other problems are added to ``report``.
    """
    options = card.options
    assert isinstance(options, SplitJsonOptions)
    path = resolve(base, options.split_file)
    if not path.is_file():
        note = "the split file is missing; it is not generated, because another split gives other results"
        raise DataError(missing_text(card, base, f"{path} ({note})"))
    raw = _read_bytes(path, report)
    items = _items(_parse(raw, path, report), card, options.variants, report)
    names = _class_names(items, path, card, report)
    check_duplicates({split: [item.path for item in items[split]] for split in SPLITS}, card.same_images, report)
    entries = list(dict.fromkeys(item.path for split in SPLITS for item in items[split] if item.path is not None))
    sources = find_images(card, base, entries, report)
    samples = {
        split: [
            Sample(item.path, item.label, sources[item.path], item.domain or _domain(card, item.path))
            for item in items[split]
            if item.path is not None and item.label is not None and item.path in sources
            and item.path not in card.excluded
        ]
        for split in SPLITS
    }  # fmt: skip
    lists = SplitLists(names, samples["train"], samples["val"], samples["test"])
    if not report.failed:
        compare_with_card(card, lists, report, sha256_bytes(raw))
    return lists


def _read_bytes(path: Path, report: Report) -> bytes:
    try:
        return read_bytes(path, _LARGEST_FILE)
    except OSError as error:
        report.error("S01", f"{path} cannot be read: {error.strerror or error}")
        report.stop()


def _parse(raw: bytes, path: Path, report: Report) -> dict[str, list[Any]]:
    """Rules S01 and S02: JSON without repeated keys, an object of exactly three lists."""
    content: Any = None
    try:
        content = parse_json(raw.decode("utf-8"), constants=False)
    except ValueError as error:  # JSON and UTF-8 errors are subclasses
        report.error("S01", f"{path} is not valid JSON: {str(error)[:200]}")
    if report.failed:
        report.stop()
    if not isinstance(content, dict):
        report.error(
            "S02", f"{path} holds a {type(content).__name__}; expected an object of the lists train, val, test"
        )
        report.stop()
    report.errors("S02", [f"unknown key {key!r}.{did_you_mean(key, SPLITS)}" for key in content if key not in SPLITS])
    for split in SPLITS:
        value = content.get(split)
        if split not in content:
            report.error("S02", f"key {split!r} is missing")
        elif not isinstance(value, list):
            report.error("S02", f"{split!r} is a {type(value).__name__}; a list is expected")
        elif not value and split != "val":
            report.error("S02", f"{split!r} is empty; only 'val' may be")
    if any(not isinstance(content.get(split), list) for split in SPLITS):
        report.stop()
    return content


def _items(content: dict[str, list[Any]], card: Card, variants: bool, report: Report) -> Items:
    """Rules S03, S04, S06 and S09: each item is ``[path, label, name]`` with valid values."""
    items: Items = {}
    domains = list(card.domains)
    for split in SPLITS:
        items[split] = []
        for index, item in enumerate(content[split]):
            where = f"{split}[{index}]"
            if not isinstance(item, list) or len(item) not in ((3, 4) if domains else (3,)):
                got = f"{len(item)} values" if isinstance(item, list) else f"a {type(item).__name__}"
                report.error("S03", f"{where}: expected [path, label, class name], got {got}")
                continue
            entry, label, name = item[0], item[1], item[-1]
            entry_problem = path_problem(entry) or (variant_problem(entry) if variants else None)
            problems = {"S04": entry_problem, "S06": label_problem(label), "S09": class_name_problem(name)}
            domain = ""
            if len(item) == 4:
                number = item[2]
                if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(domains):
                    domain = domains[number]
                else:
                    report.error("S03", f"{where}: domain {str(number)[:40]!r}; expected a number below {len(domains)}")
            for code, text in problems.items():
                if text:
                    report.error(code, f"{where}: {text}")
            valid = {
                code: None if text else value
                for (code, text), value in zip(problems.items(), (entry, label, name), strict=True)
            }
            items[split].append(Item(valid["S04"], valid["S06"], valid["S09"], domain))
    if not any(items.values()):
        report.stop()
    return items


def _class_names(items: Items, path: Path, card: Card, report: Report) -> list[str]:
    """Rules S07 to S10: labels 0..n-1, all in train, one name per label; warn if two labels share a name."""
    seen: dict[int, dict[str, None]] = {}
    for split in SPLITS:
        for item in items[split]:
            if item.label is not None:
                seen.setdefault(item.label, {}).update({} if item.name is None else {item.name: None})
    if not seen:
        report.stop()
    in_train = {item.label for item in items["train"]}
    readable = None not in in_train  # an unreadable training item may have any label
    last = max(seen)
    if 0 not in seen and set(seen) == set(range(1, last + 1)):
        report.error("S08", f"labels run 1..{last} instead of 0..{last - 1}: subtract 1 from every label")
    else:
        absent = [label for label in range(last + 1) if label not in seen]
        text = f"never occurs (0..{last} expected); class names would shift"
        report.errors("S07", [f"label {label} {text}" for label in absent])
    for label in sorted(seen):
        if readable and label not in in_train:
            name = next(iter(seen[label]), "?")
            report.error("S07", f"label {label} ({name!r}) never occurs in train")
        if len(seen[label]) > 1:
            spelled = " and ".join(repr(name) for name in list(seen[label])[:4])
            report.error("S09", f"label {label} is called {spelled}")
    names = [next(iter(seen.get(label, ())), "") for label in range(last + 1)]
    check_names(names, report, card)
    return names


def _domain(card: Card, entry: str) -> str:
    """Return the domain of an image: its first folder, and its corruption, if any."""
    if not card.domains:
        return ""
    variant = split_variant(entry)[1] if isinstance(card.options, SplitJsonOptions) and card.options.variants else ""
    folder = entry.partition("/")[0]
    domain = next((name for name, domain_folder in card.domains.items() if domain_folder == folder), folder)
    return domain + (f"+{variant}" if variant in CORRUPTIONS else "")
