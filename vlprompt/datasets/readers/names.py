"""Class names of a folder of the user: those of its folders, or of a file next to them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt._files import parse_json, read_text
from vlprompt.datasets.paths import resolve
from vlprompt.datasets.records import class_name_problem
from vlprompt.datasets.report import Report
from vlprompt.errors import did_you_mean

#: ``{"FOLDER": "NAME", ...}``, or a line ``FOLDER NAME`` for every class folder.
NAMES_JSON, NAMES_TEXT = "classes.json", "names.txt"
_LARGEST_FILE = 2**24


def names_of(base: Path, folders: Sequence[str], report: Report) -> list[str]:
    """Return the class names of ``folders``, in their order.

    A file ``classes.json`` (an object of names by folder) or ``names.txt`` (lines of a folder, a tab or a space, and
    its name) in ``base`` gives names, for all folders. Without one, the names are those of the folders.

    Args:
        base: The folder of images.
        folders: Names of the class folders.
        report: Collects the problems (rules S01, S09 and S20).
    """
    files = [resolve(base, name) for name in (NAMES_JSON, NAMES_TEXT) if os.path.lexists(base / name)]
    if not files:
        return list(folders)
    if len(files) > 1:
        report.error("S20", f"{NAMES_JSON} and {NAMES_TEXT} both name the classes; keep one of them")
        return list(folders)
    text = _text(files[0], report)
    if text is None:
        return list(folders)
    given = (_of_object if files[0].name == NAMES_JSON else _of_lines)(text, folders, report)
    name = files[0].name
    unknown = [folder for folder in given if folder not in folders]
    report.errors("S20", [f"{name}: there is no class folder {one!r}.{did_you_mean(one, folders)}" for one in unknown])
    report.errors("S20", [f"{name} has no name for class folder {one!r}" for one in folders if one not in given])
    problems = [(folder, class_name_problem(value)) for folder, value in given.items()]
    report.errors("S09", [f"{name}: folder {folder!r}: {problem}" for folder, problem in problems if problem])
    return [str(given.get(folder, folder)) for folder in folders]


def _text(path: Path, report: Report) -> str | None:
    try:
        return read_text(path, _LARGEST_FILE, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        report.error("S01", f"{path} cannot be read: {error}")
        return None


def _of_object(text: str, folders: Sequence[str], report: Report) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        report.error("S01", f"{NAMES_JSON} is not valid JSON: {str(error)[:200]}")
        return dict.fromkeys(folders, "unknown")
    if not isinstance(content, dict):
        example = json.dumps({folder: "NAME" for folder in folders[:1]}, ensure_ascii=False)
        report.error("S01", f"{NAMES_JSON} holds a {type(content).__name__}; expected names by class folder: {example}")
        return dict.fromkeys(folders, "unknown")
    return content


def _of_lines(text: str, folders: Sequence[str], report: Report) -> dict[str, Any]:
    """Return the names by folder; a folder's name may contain spaces, so the longest that begins a line is taken."""
    longest_first = sorted(folders, key=len, reverse=True)
    names: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        folder, tab, name = line.partition("\t")
        if not tab:
            found = next((one for one in longest_first if line == one or line.startswith(f"{one} ")), None)
            first, _, rest = line.partition(" ")
            folder, name = (first, rest) if found is None else (found, line[len(found) :])
        folder, name = folder.strip(), name.strip()
        if folder in names:
            report.error("S20", f"{NAMES_TEXT}:{number}: class folder {folder!r} appears twice")
        names[folder] = name or folder
    return names
