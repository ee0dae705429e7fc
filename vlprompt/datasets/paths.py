"""Checks of the paths that cards and lists name: they must stay inside the folder that they are relative to."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vlprompt.errors import DataError, has_controls

_DRIVE = re.compile(r"^[A-Za-z]:")
#: Longest path, and longest name of a file or folder, in bytes; file systems accept no longer names.
_LONGEST, _LONGEST_NAME = 1024, 255


def path_problem(path: object) -> str | None:
    """Return why ``path`` cannot be a relative image path in a split file, or ``None`` if it can (rule S04)."""
    if not isinstance(path, str):
        return f"path {_short(path)} is not text"
    if not path:
        return "the path is empty"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return f"path {_short(path)} is not valid Unicode"
    if len(encoded) > _LONGEST:
        return f"path {_short(path)} has {len(encoded)} bytes; at most {_LONGEST:,} are accepted"
    if _is_long(path):
        return f"path {_short(path)} has a name of more than {_LONGEST_NAME} bytes"
    if has_controls(path):
        return f"path {_short(path)} has control characters"
    if "\\" in path:
        return f"path {_short(path)} has a backslash; write / between folders"
    if path.startswith("/") or _DRIVE.match(path):
        return f"path {_short(path)} is absolute; paths are relative to the image folder"
    if ".." in path.split("/"):
        return f"path {_short(path)} leaves the image folder"
    if PurePosixPath(path).as_posix() != path or path == ".":
        return f"path {_short(path)} is not in its simplest form ({PurePosixPath(path).as_posix()!r})"
    return None


def stays_inside(path: str) -> bool:
    """Return whether a path of a card stays inside the folder that it is relative to."""
    outside = path.startswith(("/", "~")) or ".." in path.split("/") or _DRIVE.match(path)
    return not outside and "\\" not in path and not has_controls(path) and not _is_long(path)


def _is_long(path: str) -> bool:
    encoded = path.encode(errors="replace")
    return len(encoded) > _LONGEST or any(len(name) > _LONGEST_NAME for name in encoded.split(b"/"))


def is_file_name(name: str) -> bool:
    """Return whether a name is one step of a path: a file or folder with this name is inside its folder."""
    return name not in ("", ".", "..") and "/" not in name and stays_inside(name)


def resolve(root: Path, path: str, *, folder: bool = False) -> Path:
    """Return the place of a card's ``path`` under ``root``; every path that is composed of card fields passes here.

    Args:
        root: The folder that the path is relative to.
        path: A path of a card, after everything in braces was replaced.
        folder: Whether it is a folder of images. The user may have made it a link; files and their folders must not
            leave ``root`` through a link unless such links are allowed (:func:`links_allowed`).

    Raises:
        DataError: The path leaves ``root``.
    """
    full = root / path
    if not stays_inside(path):
        raise DataError(f"Path {_short(path)} of the data set's card is refused: it leaves {root}.")
    if not folder and not links_allowed() and not is_inside(full, os.path.realpath(root)):
        raise DataError(
            f"{full} is refused: it leaves {root} through a link, to {os.path.realpath(full)}. Copy the file there, or "
            "accept such links: export VLPROMPT_ALLOW_LINKS=1"
        )
    return full


def check_files(root: Path, paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Check that ``paths``, which have no :func:`path_problem`, exist under ``root`` (rules S05 and S15).

    Returns:
        The paths that are not regular files, and the paths that leave ``root`` through a link; the latter is empty if
        such links are allowed (:func:`links_allowed`).
    """
    real_root = os.path.realpath(root)
    inside_folder: dict[str, bool] = {}
    missing, outside, allowed = [], [], links_allowed()
    for path in paths:
        full = os.path.join(root, path)
        try:
            status = os.lstat(full)
        except OSError:
            missing.append(path)
            continue
        folder = os.path.dirname(full)
        if folder not in inside_folder:
            inside_folder[folder] = is_inside(folder, real_root)
        is_link = stat.S_ISLNK(status.st_mode)
        if not allowed and (not inside_folder[folder] or (is_link and not is_inside(full, real_root))):
            outside.append(path)
        elif not (os.path.isfile(full) if is_link else stat.S_ISREG(status.st_mode)):
            missing.append(path)
    return missing, outside


def links_allowed() -> bool:
    """Return whether the user accepts links that lead out of an image folder: ``VLPROMPT_ALLOW_LINKS=1``."""
    return os.environ.get("VLPROMPT_ALLOW_LINKS", "") not in ("", "0")


def is_inside(path: str | Path, real_root: str) -> bool:
    """Return whether ``path``, with its links resolved, is ``real_root`` or inside it."""
    real = os.path.realpath(path)
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else '"' + value.encode("unicode_escape").decode() + '"'
    return text if len(text) <= 90 else text[:60] + "..." + text[-20:]
