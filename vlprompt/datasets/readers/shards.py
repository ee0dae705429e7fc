"""Reader of image archives: webdataset tar files in CLIP_benchmark's layout, and Hugging Face's parquet files.

Nothing is unpacked to disk: images are read by their offset (:mod:`vlprompt.datasets.readers.tar_files`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from vlprompt._files import read_bytes, read_text
from vlprompt.datasets.card import Card, stated_class_names
from vlprompt.datasets.options import ShardOptions
from vlprompt.datasets.paths import resolve
from vlprompt.datasets.readers.checks import check_duplicates, check_names
from vlprompt.datasets.readers.missing import missing_text, remark
from vlprompt.datasets.readers.parquet import read_parquet
from vlprompt.datasets.readers.published import compare_with_card
from vlprompt.datasets.readers.rows import Row, Rows
from vlprompt.datasets.readers.tar_files import (
    IMAGES,
    LARGEST_TEXT,
    MOST_SHARDS,
    Index,
    Member,
    ShardSource,
    by_key,
    checked_place,
    kept_index,
    whole,
)
from vlprompt.datasets.records import SPLITS, Sample, SplitLists, class_name_problem, labels_of
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError

_SCHEMA = 2
_LARGEST_NAMES = 2**24
#: Class names by label, next to the shards.
NAMES_FILE = "classnames.txt"


def read_shards(card: Card, base: Path, report: Report) -> SplitLists:
    """Read the shards of ``card`` under ``base``; sample ids are ``<split>:<key>`` or ``<split>:<row>``.

    Raises:
        DataError: If shards are missing or nothing can be read; other problems are added to ``report``.
    """
    options = card.options
    assert isinstance(options, ShardOptions)
    rows_of: dict[str, Rows] = {}
    prefix: dict[str, str] = {}  # of the ids of a split
    for split, paths in options.splits.items():
        # Two splits with the same shards have the same images, under the same ids.
        prefix[split] = next(name for name, other in options.splits.items() if other == paths)
        rows_of[split] = rows_of.get(prefix[split]) or _rows(card, options, split, base, report)
    stored_names = next((rows.names for rows in rows_of.values() if rows.names), [])
    names = stated_class_names(card) or stored_names
    where = "" if names else f"{NAMES_FILE}: "
    names = names or _class_names(base)
    problems = enumerate(map(class_name_problem, names))
    report.errors("S09", [f"{where}label {label}: {text}" for label, text in problems if text])
    if where and names and card.classes.count not in (None, len(names)):
        report.error("S20", f"{where}{len(names):,} names; {card.name} has {card.classes.count:,} classes")
        report.stop()
    if not names:
        report.error("S20", f"there are no class names on the card or next to the shards, in {base / NAMES_FILE}")
        report.stop()
    check_names(names, report, card)
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    excluded = set(card.excluded)
    for split, rows in rows_of.items():
        _check_labels(split, rows, len(names), report)
        ids = ((f"{prefix[split]}:{row.key}", row) for row in rows.rows)
        samples[split] = [Sample(name, row.label, row.source) for name, row in ids if name not in excluded]
        if not rows.rows and split != "val":
            report.error("S02", f"the shards of {split} ({', '.join(options.splits[split])}) contain no images")
    shared = "val" in prefix and prefix["val"] == prefix.get("test")
    ids_of = {split: [] if split == "val" and shared else [sample.id for sample in samples[split]] for split in SPLITS}
    check_duplicates(ids_of, card.same_images, report)
    if "train" in options.splits:
        trained = {label for sample in samples["train"] for label in labels_of(sample)}
        report.errors(
            "S07", [f"class {name!r} has no training image" for i, name in enumerate(names) if i not in trained]
        )
    lists = SplitLists(names, samples["train"], samples["val"], samples["test"], sample_val=not shared)
    if not report.failed:
        compare_with_card(card, lists, report)
    return lists


def _rows(card: Card, options: ShardOptions, split: str, base: Path, report: Report) -> Rows:
    if options.format == "parquet":
        return read_parquet(card, options, split, base, report)
    rows = Rows([], [], [])
    for folder in options.splits[split]:
        added = _webdataset(card, base, folder, report)
        rows = Rows(rows.rows + added.rows, sorted({*rows.widths, *added.widths}), [])
    return rows


def _check_labels(split: str, rows: Rows, count: int, report: Report) -> None:
    """Rule S06: labels are class indices; a label vector has one value per class."""
    wrong = [width for width in rows.widths if width != count]
    report.errors(
        "S06", [f"{split}: a label vector has {width:,} values; there are {count:,} classes" for width in wrong]
    )
    for row in rows.rows:
        for label in row.label if isinstance(row.label, tuple) else (row.label,):
            if not 0 <= label < count:
                report.error("S06", f"{split}:{row.key}: label {label}; 0 to {count - 1:,} are expected")


def _class_names(base: Path) -> list[str]:
    try:
        text = read_text(resolve(base, NAMES_FILE), _LARGEST_NAMES, "utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{base / NAMES_FILE} cannot be read: {error}. Fetch it again.") from error
    # One line per label, including empty lines: dropping a line would shift all following names.
    return [line.strip() for line in text.rstrip("\n").split("\n")]


# -- webdataset -------------------------------------------------------------------------------------------------------
#: Shard number, offset, size, key, label or labels.
Entry = tuple[int, int, int, str, int | list[int]]


def _webdataset(card: Card, base: Path, folder: str, report: Report) -> Rows:
    place = resolve(base, folder, folder=True)
    count_file = resolve(place, "nshards.txt")
    if not count_file.is_file():
        looked_for = f"{count_file} ({remark(count_file)}; it states the number of shards)"
        raise DataError(missing_text(card, base, looked_for))
    try:
        text = read_bytes(count_file, 100).decode("ascii", "replace").strip()
    except OSError as error:
        report.error("S01", f"{folder}/{count_file.name} cannot be read: {error.strerror or error}")
        report.stop()
    if not (text.isdigit() and 0 < int(text) <= MOST_SHARDS):
        report.error("S03", f"{folder}/nshards.txt holds {text[:40]!r}; the number of shards is expected")
        report.stop()
    shards = [resolve(place, f"{number}.tar") for number in range(int(text))]
    report.errors("S15", [f"shard {folder}/{path.name} is missing" for path in shards if not path.is_file()])
    shards = [path for path in shards if path.is_file()]
    if not shards:
        report.stop()
    entries, widths = _index(shards, folder, report)
    rows = []
    for number, offset, size, key, label in entries:
        source = ShardSource(str(shards[number]), offset, size, key)
        rows.append(Row(key, tuple(label) if isinstance(label, list) else label, source))
    return Rows(rows, widths, [])


def _index(shards: list[Path], folder: str, report: Report) -> tuple[list[Entry], list[int]]:
    """Return the place of every image, and the lengths of the label vectors."""

    def read() -> Index:
        entries: dict[str, Entry] = {}
        widths: set[int] = set()
        for number, path in enumerate(shards):
            for entry in _scan(path, number, f"{folder}/{path.name}", widths, report):
                if entry[3] in entries:
                    report.error(
                        "S11", f"{entry[3]} is twice in {folder}: in {entries[entry[3]][0]}.tar and {path.name}"
                    )
                entries.setdefault(entry[3], entry)
        return {"schema": _SCHEMA, "entries": list(entries.values()), "widths": sorted(widths)}

    def check(content: Any) -> Index:
        if content["schema"] != _SCHEMA:
            raise ValueError("another schema")
        entries = [_entry(value, len(shards)) for value in content["entries"]]
        return {"schema": _SCHEMA, "entries": entries, "widths": [whole(width) for width in content["widths"]]}

    index = kept_index(shards, [_SCHEMA], check, read, report)
    return index["entries"], index["widths"]


def _entry(value: Any, shards: int) -> Entry:
    *place, label = value
    return (*checked_place(place, shards), [*map(whole, label)] if isinstance(label, list) else whole(label))


def _scan(path: Path, number: int, name: str, widths: set[int], report: Report) -> list[Entry]:
    """Read one shard from start to end."""
    entries: list[Entry] = []
    labels: dict[str, int | list[int]] = {}
    for key, kinds in by_key(path, name, ("cls", "npy"), report).items():
        for kind in ("cls", "npy"):
            if kind in kinds:
                _take_label(kinds[kind], kind, labels, widths, name, report)
        if "image" not in kinds:
            report.error("S03", f"{name}: {key} has no image ({', '.join(IMAGES)})")
        elif len(kinds) == 1:
            report.error("S03", f"{name}: {key} has no label (.cls or .npy)")
        elif key in labels:
            entries.append((number, kinds["image"].offset, kinds["image"].size, key, labels[key]))
    return entries


def _take_label(
    member: Member, kind: str, labels: dict[str, int | list[int]], widths: set[int], name: str, report: Report
) -> None:
    data = member.data or b""
    if kind == "cls":
        text = data.decode("ascii", "replace").strip()
        if text.isdigit() and len(text) < 7:
            labels[member.key] = int(text)
        else:
            report.error("S06", f"{name}: {member.name} holds {text[:40]!r}; a whole number from 0 is expected")
        return
    vector = _vector(data)
    if vector is None:
        report.error("S06", f"{name}: {member.name} is not a NumPy file of one row of 0 and 1")
    else:
        labels[member.key] = [index for index, value in enumerate(vector) if value]
        widths.add(len(vector))


def _vector(data: bytes) -> list[int] | None:
    """Return a multi-label vector of 0 and 1. The header is checked first, because it can declare any array size."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(stream)
        if len(shape) != 1 or shape[0] > LARGEST_TEXT or kind.kind not in "biuf":
            return None
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError):
        return None
    return [int(value) for value in values] if np.isin(values, (0, 1)).all() else None
