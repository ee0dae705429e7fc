"""Finds the image files that a list names, and sees whether they are whole."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from vlprompt.datasets.card import Card
from vlprompt.datasets.images import FileSource, ImageSource, ZipSource
from vlprompt.datasets.options import SplitJsonOptions
from vlprompt.datasets.paths import check_files
from vlprompt.datasets.readers.missing import missing_text
from vlprompt.datasets.report import Report
from vlprompt.datasets.variants import VariantSource, split_variant
from vlprompt.errors import DataError

_REPACKED = (
    "the images lie in other folders than the list says, as in a copy of the data set that was packed anew; their "
    "names alone would find them: say index_by: basename in a card of your own, or fetch the original archive"
)


def find_images(card: Card, base: Path, entries: list[str], report: Report) -> dict[str, ImageSource]:
    """Return where each of ``entries`` lies (rules S05 and S15: it exists, inside the image folder).

    Images that are missing, or that links lead to from outside, are left out and noted in ``report``.

    Raises:
        DataError: The image folder itself is missing.
    """
    options = card.options
    variants, archive = getattr(options, "variants", False), getattr(options, "archive", None)
    # The path as it is stored, by the path in the split file: they differ where there are variants.
    stored = {entry: split_variant(entry)[0] if variants else entry for entry in entries}
    paths = list(dict.fromkeys(stored.values()))
    found: dict[str, ImageSource]
    outside: set[str] = set()
    if archive:
        where = base / archive
        found = _archived(archive, base, paths, report)
    else:
        where = base / getattr(options, "image_dir", ".")
        if not where.is_dir():
            raise DataError(missing_text(card, base, f"{where} (the image folder is missing)"))
        by_name = isinstance(options, SplitJsonOptions) and options.index_by == "basename"
        places = _by_basename(where, paths, report) if by_name else {path: path for path in paths}
        lost, led_out = map(set, check_files(where, places.values()))
        outside = {path for path, place in places.items() if place in led_out}
        report.errors("S05", [f'"{path}" is reached through a link that leads out of {where}' for path in outside])
        found = {
            path: FileSource(os.path.join(where, place))
            for path, place in places.items()
            if place not in lost | led_out
        }
    note_missing(card, [path for path in paths if path not in found and path not in outside], len(paths), where, report)
    sources: dict[str, ImageSource] = {}
    for entry, path in stored.items():
        if path in found:
            variant = entry[len(path) + 1 :]
            sources[entry] = VariantSource(found[path], variant, path) if variant else found[path]
    return sources


def note_missing(card: Card, missing: list[str], total: int, folder: Path, report: Report) -> None:
    """Rule S15: note every image that is missing, and the likely cause."""
    if not missing:
        return
    report.errors("S15", [f"{path} is missing" for path in missing])
    some = f"{len(missing):,} of {total:,} images of {card.name} are missing under {folder}."
    cause = " Is the archive fully unpacked?"
    if 2 * len(missing) > total and _lie_elsewhere(folder, missing):
        cause = f" It looks as if {_REPACKED}."
    report.remedy = f"{some}{cause}\n{report.remedy}"


def _lie_elsewhere(folder: Path, missing: list[str]) -> bool:
    """Return whether files with the names of a few missing images lie one or two folders further down or up."""
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
    """Return where under ``folder`` the file of each path's last part lies; a name that lies twice is an error."""
    wanted = {os.path.basename(path) for path in paths}
    places: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        folders.sort(key=os.fsencode)
        for name in sorted(wanted.intersection(files), key=os.fsencode):
            own = Path(place, name).relative_to(folder).as_posix()
            if name in places:
                report.error("S15", f"{name} lies twice: {places[name]} and {own}")
            places.setdefault(name, own)
    return {path: places[os.path.basename(path)] for path in paths if os.path.basename(path) in places}


def _archived(archive: str, base: Path, paths: list[str], report: Report) -> dict[str, ImageSource]:
    """Return the archive members that ``paths`` name; with an archive per folder, members lack that folder."""
    found: dict[str, ImageSource] = {}
    present: dict[str, set[str]] = {}
    for path in paths:
        folder, _, rest = path.partition("/")
        file = str(base / archive.format(folder))
        if file not in present:
            present[file] = _archive_names(Path(file), report)
        member = rest if "{}" in archive else path
        if member in present[file]:
            found[path] = ZipSource(file, member)
    return found


def _archive_names(path: Path, report: Report) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        report.error("S15", f"archive {path} cannot be read: {error}")
        return set()


# -- whole files ------------------------------------------------------------------------------------------------------
def torn_files(sources: Iterable[tuple[str, ImageSource]]) -> list[tuple[str, str]]:
    """Return the images whose files do not end as their format does, with what is wrong.

    Only the first and last bytes are read. What looks torn is then decoded, because some cameras write a few bytes
    behind a whole picture, or leave the end mark out.
    """
    torn = []
    for name, source in sources:
        inner = source.source if isinstance(source, VariantSource) else source
        if not isinstance(inner, FileSource) or not _looks_torn(inner.path):
            continue
        try:
            inner.open()
        except DataError as error:
            torn.append((name, str(error)))
    return torn


def _looks_torn(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
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
