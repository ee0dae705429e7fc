"""Image-caption pairs from files of the user: lists, and folders with text files next to the images.

Used by :func:`vlprompt.load_pairs` together with :mod:`vlprompt.pairs.shards`. The files are untrusted input: all
problems are collected in a :class:`~vlprompt.datasets.report.Report`.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlprompt._files import parse_json, read_bytes
from vlprompt.datasets.images import IMAGE_SUFFIXES, FileSource, ImageSource, is_image
from vlprompt.datasets.paths import check_files, path_problem
from vlprompt.datasets.readers.tar_files import LARGEST_TEXT
from vlprompt.datasets.report import Report

#: Accepted column names, in any case: vlprompt's, open_clip's and those of Hugging Face's imagefolder.
_IMAGE_NAMES, _CAPTION_NAMES = ("image", "filepath", "file_name"), ("caption", "title", "text")
_LONGEST_CAPTION = 2000
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_LARGEST_LIST = 2**30


class CaptionedImage(NamedTuple):
    """An image with one of its captions; ``id`` is its path, in shards prefixed by the path of the shard."""

    id: str
    caption: str
    source: ImageSource


def caption_problem(caption: object) -> str | None:
    """Return why ``caption`` cannot be used, or ``None`` if it can (rule S03)."""
    if not isinstance(caption, str) or not 0 < len(caption.strip()) <= _LONGEST_CAPTION:
        accepted = f"expected a text of 1 to {_LONGEST_CAPTION:,} characters"
        return f"the caption is {str(caption)[:40]!r}; {accepted}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return f"the caption {caption[:40]!r} is not valid Unicode"
    return f"the caption {caption[:40]!r} has control characters" if _CONTROLS.search(caption) else None


# -- lists ------------------------------------------------------------------------------------------------------------
def read_list(path: Path, report: Report) -> list[tuple[str, str]]:
    """Return the image paths and captions of a list: a table if it ends in .csv or .tsv, else JSON lines.

    Raises:
        DataError: If the file cannot be read, or has no columns of images and captions; other problems are added to
            ``report``.
    """
    text = _list_text(path, report)
    ending = path.suffix.lower()
    entries = _table(text, ending == ".tsv", report) if ending in (".csv", ".tsv") else _objects(text, report)
    rows: list[tuple[str, str]] = []
    for number, image, caption in entries:
        if problem := path_problem(image):
            report.error("S04", f"line {number}: {problem}")
        elif problem := caption_problem(caption):
            report.error("S03", f"line {number}: {problem}")
        else:
            rows.append((image, caption.strip()))
    if not rows and not report.failed:
        report.error("S02", "there are no lines with pairs")
    return rows


def _list_text(path: Path, report: Report) -> str:
    try:
        data = read_bytes(path, _LARGEST_LIST)
    except OSError as error:
        report.error("S01", f"the file cannot be read: {error.strerror or error}")
        report.stop()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        report.error("S01", f"line {line}: {_utf8_problem(error)}")
        report.stop()


def _objects(text: str, report: Report) -> Iterator[tuple[int, Any, Any]]:
    """Yield line number, image and caption of every JSON object that has both."""
    # Not splitlines: JSON texts may contain other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        columns = _columns(list(row)) if isinstance(row, dict) else None
        if columns is None:
            report.error("S03", f'line {number}: expected {{"image": PATH, "caption": TEXT}}, got {line[:60]!r}')
        else:
            values = list(row.values())
            yield number, values[columns[0]], values[columns[1]]


def _table(text: str, tabs: bool, report: Report) -> Iterator[tuple[int, str, str]]:
    """Yield line number, image and caption of every row below the header."""
    head = text.partition("\n")[0]
    # open_clip's .csv tables are separated by tabs.
    delimiter = "\t" if tabs or ("\t" in head and "," not in head) else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[int, int] | None = None
    width = 0
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.error("S03", f"line {number}: not a row of a table: {error}")
            continue
        if not row:
            continue
        if columns is None:
            columns, width = _columns(row), len(row)
            if columns is None:
                names = [" or ".join(accepted) for accepted in (_IMAGE_NAMES, _CAPTION_NAMES)]
                expected = f"a column of images ({names[0]}) and one of captions ({names[1]}) are expected"
                report.error("S03", f"line {number}: the header is {str(row)[:200]}; {expected}")
                report.stop()
        elif len(row) != width:
            quoted = '; a caption that contains the separator must be in "quotation marks"'
            report.error("S03", f"line {number}: the header has {width} fields, this line has {len(row)}{quoted}")
        else:
            yield number, row[columns[0]], row[columns[1]]


def _columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Return the columns of image and caption among ``names``: for each the first accepted name that occurs."""
    plain = [name.strip().lower() for name in names]
    image, caption = (
        next((plain.index(name) for name in accepted if name in plain), None)
        for accepted in (_IMAGE_NAMES, _CAPTION_NAMES)
    )
    return None if image is None or caption is None else (image, caption)


# -- folders ----------------------------------------------------------------------------------------------------------
def read_sidecars(base: Path, report: Report) -> list[CaptionedImage]:
    """Return the images under ``base`` with the captions in their text files, in order of their paths' UTF-8 bytes.

    Every non-empty line of ``a.txt`` is a caption of ``a.jpg``. Names that begin with a dot are skipped.
    """
    images: list[str] = []
    others: list[str] = []

    def unreadable(error: OSError) -> None:
        report.error("S15", f"folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, files in os.walk(base, onerror=unreadable):
        inside = os.path.relpath(place, base)
        prefix = "" if inside == "." else Path(inside).as_posix() + "/"
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = sorted(name for name in folders if os.path.islink(os.path.join(place, name)))
        report.errors("S05", [f"{prefix}{name}/ is a link to a folder, which is not followed" for name in links])
        images += [prefix + name for name in files if is_image(name) and not name.startswith(".")]
        others += [prefix + name for name in files if not is_image(name) or name.startswith(".")]
    images.sort(key=os.fsencode)
    if not images:
        report.error("S02", f"there are no .tar files and no images ({', '.join(IMAGE_SUFFIXES)})")
    problems = {image: problem for image in images if (problem := path_problem(image))}
    report.errors("S04", problems.values())
    texts = {image: f"{image.rpartition('.')[0]}.txt" for image in images if image not in problems}
    used = set(texts.values())
    for name in sorted(set(others) - used, key=os.fsencode):
        report.passed.add(name, ".txt without an image" if name.endswith(".txt") else "")
    missing, outside = map(set, check_files(base, dict.fromkeys([*texts, *texts.values()])))
    report.errors("S05", [f'"{path}" is reached through a link that leaves {base}' for path in sorted(outside)])
    report.errors("S15", [f"{image} is not a file" for image in texts if image in missing])
    report.errors("S15", [f"{image} has no text file {text}" for image, text in texts.items() if text in missing])
    unusable = missing | outside
    return [
        CaptionedImage(image, caption, FileSource(os.path.join(base, image)))
        for image, text in texts.items()
        if image not in unusable and text not in unusable
        for caption in captions_of(_text_of(base / text), text, report)
    ]


def _text_of(path: Path) -> bytes | None:
    try:
        return read_bytes(path, LARGEST_TEXT)
    except OSError:
        return None


def captions_of(data: bytes | None, name: str, report: Report) -> list[str]:
    """Return the non-empty lines of a text file; none if the file has a problem.

    Args:
        data: Content of the file; ``None`` if it cannot be read or is too large.
        name: Name of the file in problem texts.
        report: Collects the problems.
    """
    if data is None:
        report.error("S01", f"{name} cannot be read or has more than {LARGEST_TEXT:,} bytes")
        return []
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        report.error("S01", f"{name}: {_utf8_problem(error)}")
        return []
    captions = [line.strip() for line in lines if line.strip()]
    problems = [problem for caption in captions or [""] if (problem := caption_problem(caption))]
    report.errors("S03", [f"{name}: {problem}" for problem in problems])
    return [] if problems else captions


def _utf8_problem(error: UnicodeDecodeError) -> str:
    return f"byte {error.start:,} is not UTF-8 ({error.reason}); save it as UTF-8"
