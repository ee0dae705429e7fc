"""Lookup of the image files that a list names, and a check for truncated files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from vlprompt._files import open_regular
from vlprompt.datasets.card import Card
from vlprompt.datasets.images import ZIP_ERRORS, FileSource, ImageSource, ZipSource, is_image
from vlprompt.datasets.options import SplitJsonOptions
from vlprompt.datasets.paths import check_files, resolve
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.report import Report
from vlprompt.datasets.variants import VariantSource, split_variant
from vlprompt.errors import DataError

_REPACKED = (
    "the images are in other folders than the list names, as in a repacked copy of the data set. Set index_by: "
    "basename in a card of your own to find them by file name, or fetch the original archive"
)


def find_images(card: Card, base: Path, entries: list[str], report: Report) -> dict[str, ImageSource]:
    """Return the image source of each entry (rules S05 and S15: it exists and is inside the image folder).

    Images that are missing or outside the image folder are omitted and added to ``report``.

    Raises:
        DataError: If the image folder is missing.
    """
    options = card.options
    variants, archive = getattr(options, "variants", False), getattr(options, "archive", None)
    # Stored path by path in the split file; they differ for variants.
    stored = {entry: split_variant(entry)[0] if variants else entry for entry in entries}
    paths = list(dict.fromkeys(stored.values()))
    stored_sources: dict[str, ImageSource]
    outside: set[str] = set()
    if archive:
        where = base / archive  # for texts; the archives are resolved one by one
        stored_sources = _archived(archive, base, paths, report, own=card.own)
    else:
        where = resolve(base, getattr(options, "image_dir", "."), folder=True)
        if not where.is_dir():
            raise DataError(missing_text(card, base, f"{where} (the image folder is missing)"))
        by_name = isinstance(options, SplitJsonOptions) and options.index_by == "basename"
        places = _by_basename(where, paths, report) if by_name else {path: path for path in paths}
        lost, linked_out = map(set, check_files(where, places.values()))
        outside = {path for path, place in places.items() if place in linked_out}
        report.errors("S05", [f'"{path}" is reached through a link that leaves {where}' for path in outside])
        stored_sources = {
            path: FileSource(os.path.join(where, place))
            for path, place in places.items()
            if place not in lost | linked_out
        }
    if card.own and not archive:
        _pass_unlisted(where, set(places.values()), report)
    missing = [path for path in paths if path not in stored_sources and path not in outside]
    note_missing(card, missing, len(paths), where, report)
    sources: dict[str, ImageSource] = {}
    for entry, path in stored.items():
        if path in stored_sources:
            variant, source = entry[len(path) + 1 :], stored_sources[path]
            sources[entry] = VariantSource(source, variant, path) if variant else source
    return sources


def _pass_unlisted(folder: Path, listed: set[str], report: Report) -> None:
    """Count the images of the user under ``folder`` that no list names."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, folder)
        prefix = "" if inside == "." else Path(inside).as_posix() + "/"
        for name in sorted(files):
            if is_image(name) and prefix + name not in listed:
                report.passed.add(prefix + name, "images that no list names")


def note_missing(card: Card, missing: list[str], total: int, folder: Path, report: Report) -> None:
    """Rule S15: add every missing image to ``report``, and the likely cause to its remedy."""
    if not missing:
        return
    report.errors("S15", [f"{path} is missing" for path in missing])
    some = f"{len(missing):,} of {total:,} images of {card.name} are missing under {folder}."
    cause = " Is the archive completely unpacked?"
    if 2 * len(missing) > total and _are_elsewhere(folder, missing):
        cause = f" Probably {_REPACKED}."
    report.remedy = f"{some}{cause}\n{report.remedy}"


def _are_elsewhere(folder: Path, missing: list[str]) -> bool:
    """Return whether files with the names of some missing images exist elsewhere under ``folder``."""
    wanted = {os.path.basename(path) for path in missing[:50]}
    looked = 0
    for _, folders, files in os.walk(folder):
        if wanted & set(files):
            return True
        folders.sort()
        looked += len(files) + len(folders)
        if looked > 20_000:
            break
    return False


def _by_basename(folder: Path, paths: list[str], report: Report) -> dict[str, str]:
    """Return by path the place under ``folder`` of the file of that base name; a name found twice is an error."""
    wanted = {os.path.basename(path) for path in paths}
    places: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        folders.sort(key=os.fsencode)
        for name in sorted(wanted.intersection(files), key=os.fsencode):
            relative = Path(place, name).relative_to(folder).as_posix()
            if name in places:
                report.error("S15", f"{name} exists twice: {places[name]} and {relative}")
            places.setdefault(name, relative)
    return {path: places[os.path.basename(path)] for path in paths if os.path.basename(path) in places}


def _archived(archive: str, base: Path, paths: list[str], report: Report, *, own: bool) -> dict[str, ImageSource]:
    """Return the archive members that ``paths`` name; with one archive per folder, members omit the folder."""
    sources: dict[str, ImageSource] = {}
    files: dict[str, str] = {}
    present: dict[str, set[str]] = {}
    used: dict[str, set[str]] = {}
    for path in paths:
        folder, _, rest = path.partition("/")
        folder, member = (folder, rest) if "{}" in archive else ("", path)
        if folder not in files:
            file = files[folder] = str(resolve(base, archive.replace("{}", folder)))
            present[file] = _archive_names(Path(file), report)
        if member in present[files[folder]]:
            sources[path] = ZipSource(files[folder], member)
            used.setdefault(files[folder], set()).add(member)
    for file, members in present.items() if own else ():
        for member in sorted(members - used.get(file, set())):
            if is_image(member):
                report.passed.add(member, "images that no list names")
    return sources


def _archive_names(path: Path, report: Report) -> set[str]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return set(archive.namelist())
    except ZIP_ERRORS as error:
        report.error("S15", f"archive {path} cannot be read: {error}")
        return set()


# -- truncated files --------------------------------------------------------------------------------------------------
def truncated_files(sources: Iterable[tuple[str, ImageSource]]) -> list[tuple[str, str]]:
    """Return the names of truncated image files, each with its problem.

    The first and last bytes of each file are compared with the format's marks. A file that looks truncated is then
    decoded, because some cameras append bytes after the end mark or omit it.
    """
    truncated = []
    for name, source in sources:
        inner = source.source if isinstance(source, VariantSource) else source
        if not isinstance(inner, FileSource) or not _looks_truncated(inner.path):
            continue
        try:
            inner.open()
        except DataError as error:
            truncated.append((name, str(error)))
    return truncated


def _looks_truncated(path: str) -> bool:
    try:
        with open_regular(path) as stream:
            head = stream.read(8)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 64))
            tail = stream.read(64)
    except OSError:
        return True
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in tail[-16:]
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail[-16:]
    return size < 16 or head.startswith(b"\0\0\0\0")
