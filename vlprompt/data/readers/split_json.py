"""Reader of CoOp's split files: ``{"train": [[path, label, name], ...], "val": [...], "test": [...]}``.

A split file is a stranger's file. It is checked stage by stage against rules S01-S15 of datasets.md 6.3; each stage
collects all its problems before it stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlprompt.data.cards import Card
from vlprompt.data.images import FileSource, ImageSource, ZipSource
from vlprompt.data.paths import check_files, path_problem
from vlprompt.data.readers.missing import missing_text
from vlprompt.data.records import SPLITS, Sample, SplitLists, class_name_problem, counted, refuse
from vlprompt.data.variants import CORRUPTIONS, VariantSource, split_variant, variant_problem
from vlprompt.errors import DataError, did_you_mean

_LARGEST_FILE = 64 * 2**20
_LARGEST_LABEL = 100_000
Items = dict[str, list[tuple[str, int, str]]]


def read_split_json(card: Card, base: Path) -> SplitLists:
    """Read the split file of ``card`` under ``base`` and find its images.

    A missing split file is never made anew: the split would differ from the published one and depend on the order of
    a directory listing.

    Raises:
        DataError: If the split file or images are missing, or a rule is broken. A split whose size or content
            differs from the published one is accepted with a ``UserWarning``.
    """
    path = base / (card.split_file or "")
    if not path.is_file():
        note = "the split file is missing; it is not made anew, because another split gives other results"
        raise DataError(missing_text(card, base, f"{path} ({note})"))
    remedy = f"Correct the file, or fetch the published one: {card.home}; {card.notes.strip()}"
    raw = _read_bytes(path)
    items = _items(_parse(raw, path, remedy), path, remedy, card.variants)
    names = _class_names(items, path, remedy)
    _check_duplicates(items, path, remedy)
    if card.classes is not None and len(names) != card.classes:
        counts = f"{counted(len(names), 'class')}; {card.name} has {card.classes}"
        raise DataError(f"Split file {path} has {counts}.\n{remedy}")
    sources = find_images(card, base, [entry for split in SPLITS for entry, _, _ in items[split]])
    train, val, test = (
        [Sample(entry, label, sources[entry], _domain(card, entry)) for entry, label, _ in items[split]]
        for split in SPLITS
    )
    lists = SplitLists(names, train, val, test)
    _compare_with_published(card, lists, raw, path)
    return lists


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise DataError(f"Split file {path} has {size:,} bytes; at most {_LARGEST_FILE:,} are read.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Split file {path} cannot be read: {error.strerror or error}.") from error


def _parse(raw: bytes, path: Path, remedy: str) -> dict[str, list[Any]]:
    """Rules S01 and S02: JSON without repeated keys; an object of exactly three lists."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"key {key!r} appears twice")
            table[key] = value
        return table

    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError as error:
        raise DataError(f"Split file {path} is nested too deeply.\n{remedy}") from error
    except ValueError as error:  # also what JSON and UTF-8 errors are
        raise DataError(f"Split file {path} is not valid JSON: {str(error)[:200]}.\n{remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"Split file {path} holds a {type(content).__name__}; expected an object of 3 lists.\n{remedy}")
    problems = [f"unknown key {key!r}.{did_you_mean(key, SPLITS)}" for key in content if key not in SPLITS]
    for split in SPLITS:
        value = content.get(split)
        if split not in content:
            problems.append(f"key {split!r} is missing")
        elif not isinstance(value, list):
            problems.append(f"{split!r} is a {type(value).__name__}; a list is expected")
        elif not value and split != "val":
            problems.append(f"{split!r} is empty; only 'val' may be")
    refuse(f"Split file {path} does not have the keys train, val, test", problems, remedy)
    return content


def _items(content: dict[str, list[Any]], path: Path, remedy: str, variants: bool) -> Items:
    """Rules S03, S04, S06 and S09: each item is ``[path, label, name]`` with safe and sensible parts."""
    problems: list[str] = []
    items: Items = {}
    for split in SPLITS:
        items[split] = []
        for index, item in enumerate(content[split]):
            where = f"{split}[{index}]"
            if not isinstance(item, list) or len(item) != 3:
                got = f"{len(item)} values" if isinstance(item, list) else f"a {type(item).__name__}"
                problems.append(f"{where}: expected [path, label, class name], got {got}")
                continue
            entry, label, name = item
            found = [path_problem(entry), _label_problem(label), class_name_problem(name)]
            if variants and found[0] is None:
                found[0] = variant_problem(entry)
            problems += [f"{where}: {text}" for text in found if text]
            items[split].append((entry, label, name))
    refuse(f"Split file {path} has items that cannot be used", problems, remedy)
    return items


def _label_problem(label: object) -> str | None:
    if isinstance(label, bool) or not isinstance(label, int):
        shown = f"{label!r}"
        return f"label {shown[:60]} is a {type(label).__name__}; labels are whole numbers from 0"
    if not 0 <= label < _LARGEST_LABEL:
        return f"label {str(label)[:30]} is out of range; labels run from 0 and stay below {_LARGEST_LABEL:,}"
    return None


def _class_names(items: Items, path: Path, remedy: str) -> list[str]:
    """Rules S07-S10: labels 0..n-1, all in train; one name per label. Two labels with one name only warn."""
    seen: dict[int, dict[str, None]] = {}
    for split in SPLITS:
        for _, label, name in items[split]:
            seen.setdefault(label, {})[name] = None
    in_train = {label for _, label, _ in items["train"]}
    problems = []
    last = max(seen)
    if 0 not in seen and set(seen) == set(range(1, last + 1)):
        problems.append(f"labels run 1..{last} instead of 0..{last - 1}: subtract 1 from every label")
    else:
        absent = [label for label in range(last + 1) if label not in seen]
        problems += [f"label {label} never occurs (0..{last} expected); class names would shift" for label in absent]
    for label in sorted(seen):
        if label not in in_train:
            problems.append(f"label {label} ({next(iter(seen[label]))!r}) never occurs in train")
        if len(seen[label]) > 1:
            spelled = " and ".join(repr(name) for name in list(seen[label])[:4])
            problems.append(f"label {label} is called {spelled}")
    refuse(f"Split file {path} has labels that do not fit together", problems, remedy)
    names = [next(iter(seen[label])) for label in range(last + 1)]
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if first.setdefault(name, label) != label:
            warnings.warn(f"{path}: labels {first[name]} and {label} are both {name!r}", stacklevel=2)
    return names


def _check_duplicates(items: Items, path: Path, remedy: str) -> None:
    """Rule S11: no image twice, neither in one split nor in two."""
    problems = []
    owner: dict[str, str] = {}
    for split in SPLITS:
        for entry, _, _ in items[split]:
            if entry in owner:
                both = f"twice in {split}" if owner[entry] == split else f"in {owner[entry]} and in {split}"
                problems.append(f"{entry} is {both}")
            owner.setdefault(entry, split)
    refuse(f"Split file {path} names images more than once", problems, remedy)


def _domain(card: Card, entry: str) -> str:
    """Return the domain of an image: its first folder, and its corruption if it has one."""
    if not card.domains:
        return ""
    variant = split_variant(entry)[1] if card.variants else ""
    return entry.partition("/")[0] + (f"+{variant}" if variant in CORRUPTIONS else "")


def find_images(card: Card, base: Path, entries: list[str]) -> dict[str, ImageSource]:
    """Return where each of ``entries`` lies (rules S05 and S15: it exists, inside the image folder).

    Raises:
        DataError: Images are missing, or links lead out of the folder; all of them are listed.
    """
    # The path as it is stored, by the path in the split file: they differ where there are variants.
    stored = {entry: split_variant(entry)[0] if card.variants else entry for entry in entries}
    found: dict[str, ImageSource]
    if card.archive:
        found = _archived(card, base, sorted(set(stored.values())))
    else:
        folder = base / card.image_dir
        if not folder.is_dir():
            raise DataError(missing_text(card, base, f"{folder} (the image folder is missing)"))
        missing, outside = check_files(folder, dict.fromkeys(stored.values()))
        refuse_links(outside, folder)
        refuse_missing(missing, len(entries), folder, card)
        found = {path: FileSource(os.path.join(folder, path)) for path in stored.values()}
    sources = {}
    for entry, path in stored.items():
        variant = entry[len(path) + 1 :]
        sources[entry] = VariantSource(found[path], variant, path) if variant else found[path]
    return sources


def _archived(card: Card, base: Path, paths: list[str]) -> dict[str, ImageSource]:
    """Return the archive members that ``paths`` name; with an archive per folder, members lack that folder."""
    found: dict[str, ImageSource] = {}
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, rest = path.partition("/")
        archive, member = str(base / str(card.archive).format(folder)), path
        if "{}" in str(card.archive):
            member = rest
        if archive not in present:
            present[archive] = _archive_names(Path(archive))
        if member in present[archive]:
            found[path] = ZipSource(archive, member)
        else:
            missing.append(path)
    refuse_missing(missing, len(paths), base / str(card.archive), card)
    return found


def _archive_names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"Image archive {path} cannot be read: {error}.") from error


def refuse_links(outside: list[str], folder: Path) -> None:
    """Raise a :class:`~vlprompt.errors.DataError` if links lead out of ``folder``."""
    problems = [f'"{entry}" is reached through a link' for entry in outside]
    refuse(f"Links lead out of {folder}", problems, "Copy the images into the folder, or give the folder they are in.")


def refuse_missing(missing: Iterable[str], total: int, folder: Path, card: Card) -> None:
    """Raise one :class:`~vlprompt.errors.DataError` for all ``missing`` images, if there are any."""
    missing = list(missing)
    if missing:
        shown = "".join(f"\n  - {entry}" for entry in missing[:20])
        more = f"\n  ... and {len(missing) - 20:,} more" if len(missing) > 20 else ""
        raise DataError(
            f"{len(missing):,} of {total:,} images of {card.name} are missing under {folder}:{shown}{more}\n"
            f"Is the archive fully unpacked? {card.notes.strip()}"
        )


def _compare_with_published(card: Card, lists: SplitLists, raw: bytes, path: Path) -> None:
    """Rules S13 and S14: say when this is not the published split."""
    if is_published(card, lists.content_sha256(), hashlib.sha256(raw).hexdigest()):
        return
    sizes = {split: len(getattr(lists, split)) for split in SPLITS}
    if card.sizes is not None and sizes != dict(card.sizes):
        warnings.warn(f"{path} has {sizes}; the published split has {dict(card.sizes)}. {_CUSTOM}", stacklevel=2)
    elif card.split_content_sha256 or card.split_file_sha256:
        warnings.warn(f"{path} differs from the published split. {_CUSTOM}", stacklevel=2)


_CUSTOM = "Results on it cannot be compared with published ones."


def is_published(card: Card, content_sha256: str, file_sha256: str) -> bool:
    """Return whether a split is the published one, by its content or, where only that is known, by its file."""
    return content_sha256 == card.split_content_sha256 or file_sha256 == card.split_file_sha256
