"""Reader of archives of many images: webdataset's tar files in CLIP_benchmark's layout, and Hugging Face's parquet.

A tar file has no table of contents. The first reading notes where every image lies in an index in the cache folder, so
that images can be read in any order and in any process without a second pass. Nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlprompt.data.cards import Card, card_class_names
from vlprompt.data.images import ImageSource, decode_rgb
from vlprompt.data.options import ShardOptions
from vlprompt.data.paths import path_problem
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.readers.published import compare_with_card
from vlprompt.data.readers.split_json import check_duplicates, check_names
from vlprompt.data.records import SPLITS, Label, Sample, SplitLists, class_name_problem, labels_of
from vlprompt.data.report import Report
from vlprompt.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_SCHEMA = 1
_MOST_SHARDS = 100_000
_LARGEST_LABEL_FILE = 2**20
_IMAGES = ("webp", "png", "jpg", "jpeg")
#: webdataset's rule: what stands before the first dot of the file name is the key.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^/.]*)\.([^/]+)$")


@dataclass(frozen=True)
class Row:
    """An image of a shard: its key within the split, its label or labels, and where it is."""

    key: str
    label: Label
    source: ImageSource


@dataclass
class Rows:
    """The images of a split, and how many values its multi-label vectors have (empty: one label an image)."""

    rows: list[Row]
    widths: list[int]
    names: list[str]


def read_shards(card: Card, base: Path, report: Report) -> SplitLists:
    """Read the shards of ``card`` under ``base``; sample ids are ``<split>:<key>`` or ``<split>:<row>``.

    Raises:
        DataError: If shards are missing or nothing is left to read; problems that reading survives are in ``report``.
    """
    options = card.options
    assert isinstance(options, ShardOptions)
    found: dict[str, Rows] = {}
    word: dict[str, str] = {}
    for split, paths in options.splits.items():
        # Two splits of the same shards have the same images, under one id.
        word[split] = next(name for name, other in options.splits.items() if other == paths)
        found[split] = found[word[split]] if word[split] in found else _rows(card, options, split, base, report)
    own = next((rows.names for rows in found.values() if rows.names), [])
    names = card_class_names(card) or own or _class_names(base)
    report.errors(
        "S09", [f"label {label}: {text}" for label, one in enumerate(names) if (text := class_name_problem(one))]
    )
    if not names:
        report.error("S20", "there are no class names: neither on the card nor beside the shards")
        report.stop()
    check_names(names, report)
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    left_out = set(card.excluded)
    for split, rows in found.items():
        _check_labels(split, rows, len(names), report)
        ids = ((f"{word[split]}:{row.key}", row) for row in rows.rows)
        samples[split] = [Sample(name, row.label, row.source) for name, row in ids if name not in left_out]
        if not rows.rows and split != "val":
            report.error("S02", f"the shards of {split} hold no images")
    shared = "val" in word and word["val"] == word.get("test")
    paths_of = {split: [] if split == "val" and shared else [one.id for one in samples[split]] for split in SPLITS}
    check_duplicates(paths_of, card.same_images, report)
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
        from vlprompt.data.readers.parquet import read_parquet

        return read_parquet(card, options, split, base, report)
    whole = Rows([], [], [])
    for folder in options.splits[split]:
        part = _webdataset(card, base, folder, report)
        whole = Rows(whole.rows + part.rows, sorted({*whole.widths, *part.widths}), [])
    return whole


def _check_labels(split: str, rows: Rows, count: int, report: Report) -> None:
    """Rule S06: labels lie within the classes; a vector of labels has a value for every class."""
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
        text = (base / "classnames.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{base / 'classnames.txt'} cannot be read: {error}. Fetch it again.") from error
    # A line for every label, empty ones too: a missing one would shift all names behind it.
    return [line.strip() for line in text.rstrip("\n").split("\n")]


# -- webdataset -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShardSource:
    """An image inside a tar file.

    Attributes:
        path: The tar file.
        offset: Where the image's bytes begin.
        size: How many there are.
        key: What the image is called there.
    """

    path: str
    offset: int
    size: int
    key: str

    def open(self) -> Image:
        """Decode the image. Raises :class:`~vlprompt.errors.DataError` that names it."""
        name = f"{self.path}:{self.key}"
        try:
            # Opened for every image: an open file would share its position with forked workers and with threads.
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise DataError(f"Image {name} cannot be read: {error.strerror or error}.") from error
        if len(data) < self.size:
            raise DataError(f"Image {name} cannot be read: the shard ends within it. Fetch the shard again.")
        return decode_rgb(data, name)

    def stamp(self) -> str:
        """Return size and modification time of the shard, and the image's place in it."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"Shard {self.path} cannot be read: {error.strerror or error}.") from error
        return f"{status.st_size}-{status.st_mtime_ns}-{self.offset}"


#: shard number, offset, size, key, label or labels
Entry = tuple[int, int, int, str, int | list[int]]


def _webdataset(card: Card, base: Path, folder: str, report: Report) -> Rows:
    place = base / folder
    count_file = place / "nshards.txt"
    if not count_file.is_file():
        raise DataError(missing_text(card, base, f"{count_file} (does not exist; it holds the number of shards)"))
    text = count_file.read_bytes()[:100].decode("ascii", "replace").strip()
    if not (text.isdigit() and 0 < int(text) <= _MOST_SHARDS):
        report.error("S03", f"{folder}/nshards.txt holds {text[:40]!r}; the number of shards is expected")
        report.stop()
    shards = [place / f"{number}.tar" for number in range(int(text))]
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
    """Return where every image lies, from the cache if these shards were indexed before and had no problems."""
    status = [(str(path), found.st_size, found.st_mtime_ns) for path in shards for found in [path.stat()]]
    key = hashlib.sha256(json.dumps([_SCHEMA, status]).encode()).hexdigest()
    own = os.environ.get("VLPROMPT_CACHE") or "~/.cache/vlprompt"
    file = Path(own).expanduser() / "shards" / f"{key}.json"
    known = _stored(file, len(shards))
    if known is not None:
        return known
    before = len(report.problems)
    entries: dict[str, Entry] = {}
    widths: set[int] = set()
    for number, path in enumerate(shards):
        for entry in _scan(path, number, f"{folder}/{path.name}", widths, report):
            if entry[3] in entries:
                report.error("S11", f"{entry[3]} is twice in {folder}: in {entries[entry[3]][0]}.tar and {path.name}")
            entries.setdefault(entry[3], entry)
    found = list(entries.values()), sorted(widths)
    if len(report.problems) == before:
        _store(file, {"schema": _SCHEMA, "entries": found[0], "widths": found[1]})
    return found


def _stored(file: Path, shards: int) -> tuple[list[Entry], list[int]] | None:
    try:
        content = json.loads(file.read_bytes())
        if content["schema"] != _SCHEMA:
            return None
        entries = [_entry(one, shards) for one in content["entries"]]
        widths = [_whole(one) for one in content["widths"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not there, or damaged: the shards are read again
    return entries, widths


def _entry(value: Any, shards: int) -> Entry:
    number, offset, size, key, label = value
    if not isinstance(key, str) or path_problem(key) or not _whole(number) < shards:
        raise ValueError(f"{value!r} is no entry of an index")
    return (
        number,
        _whole(offset),
        _whole(size),
        key,
        [*map(_whole, label)] if isinstance(label, list) else _whole(label),
    )


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _store(file: Path, content: dict[str, Any]) -> None:
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".writing-", delete=False) as stream:
            temporary = stream.name
            json.dump(content, stream)
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        text = f"The index of the shards cannot be kept in {file.parent} ({error}); they are read through every time."
        warnings.warn(f"{text} Give another folder: export VLPROMPT_CACHE=FOLDER", stacklevel=2)


def _scan(path: Path, number: int, name: str, widths: set[int], report: Report) -> list[Entry]:
    """Read through one shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | list[int]] = {}
    keys: dict[str, None] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:  # "r:": in a compressed one, images have no place of their own
            for member in archive:
                if member.isdir():
                    continue
                key, ending = _key(member, name, report)
                if not key:
                    continue
                if member.offset_data + member.size > size:
                    report.error("S01", f"{name} ends within {member.name}")
                elif ending in _IMAGES:
                    if key in images:
                        report.error("S11", f"{name}: {key} is there twice")
                    keys[key] = None
                    images[key] = member.offset_data, member.size
                elif ending in ("cls", "npy"):
                    keys[key] = None
                    _take_label(archive, member, ending, key, labels, widths, name, report)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        report.error("S01", f"shard {name} cannot be read as a plain tar file: {str(error)[:200]}")
    for key in keys:
        if key not in images:
            report.error("S03", f"{name}: {key} has no image ({', '.join(_IMAGES)})")
        elif key not in labels:
            report.error("S03", f"{name}: {key} has no label (.cls or .npy)")
    return [(number, *images[key], key, labels[key]) for key in keys if key in images and key in labels]


def _key(member: tarfile.TarInfo, name: str, report: Report) -> tuple[str, str]:
    """Return key and ending of a regular member; no key where it cannot be used (rule S04) or is none of ours."""
    own = member.name.removeprefix("./")
    if not member.isreg() or member.issparse():
        report.error("S04", f"{name}: {own[:80]!r} is a link, a device or sparse; only plain files are read")
    elif problem := path_problem(own):
        report.error("S04", f"{name}: {problem}")
    elif match := _MEMBER.match(own):
        return match[1], match[2].lower()
    return "", ""


def _take_label(
    archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, key: str, labels: dict[str, int | list[int]],
    widths: set[int], name: str, report: Report,
) -> None:  # fmt: skip
    stream = archive.extractfile(member) if member.size <= _LARGEST_LABEL_FILE else None
    data = b"" if stream is None else stream.read()
    if ending == "cls":
        text = data.decode("ascii", "replace").strip()
        if text.isdigit() and len(text) < 7:
            labels[key] = int(text)
        else:
            report.error("S06", f"{name}: {member.name} holds {text[:40]!r}; a whole number from 0 is expected")
        return
    vector = _vector(data)
    if vector is None:
        report.error("S06", f"{name}: {member.name} is no NumPy file of one row of 0 and 1")
    else:
        labels[key] = [index for index, value in enumerate(vector) if value]
        widths.add(len(vector))


def _vector(data: bytes) -> list[int] | None:
    """Return a multi-label vector of 0 and 1. The header is looked at first: it may promise an array of any size."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(stream)
        if len(shape) != 1 or shape[0] > _LARGEST_LABEL_FILE or kind.kind not in "biuf":
            return None
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError):
        return None
    return [int(value) for value in values] if np.isin(values, (0, 1)).all() else None
