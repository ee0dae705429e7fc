"""What a feature store holds, and what may go: damaged entries, leftovers, and the least recently used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from vlprompt._files import LEFTOVER
from vlprompt.data.features import LOCKS, SCHEMA, lock_of, read_entry
from vlprompt.errors import DataError

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LOCK = re.compile(r"[0-9a-f]{64}\.lock")
DAY = 86_400


@dataclass(frozen=True)
class Entry:
    """A file of the store.

    Attributes:
        path: The file.
        size: Its bytes.
        used: When it was last used, in seconds since 1970.
        key: What the features depend on; empty where it cannot be read.
        shape: The features' shape.
        why: Why it is of no use, in words; empty for a good entry.
    """

    path: Path
    size: int
    used: float
    key: dict[str, Any]
    shape: tuple[int, ...]
    why: str = ""


def entries(folder: Path) -> list[Entry]:
    """Return the store's entries, the last used first. Their checksums are not compared."""
    return sorted(_entries(folder), key=lambda entry: (-entry.used, entry.path.name))


def _entries(folder: Path) -> Iterator[Entry]:
    for path in _own(folder, _ENTRY):
        with contextlib.suppress(FileNotFoundError):  # another process pruned it
            status = path.stat()
            used = max(status.st_atime, status.st_mtime)
            facts = _header(path)
            with contextlib.suppress(OSError):  # looking at it is no use of it
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            if facts is None:
                yield Entry(path, status.st_size, used, {}, (), "damaged")
            elif facts[0].get("schema", "").startswith("vlprompt features "):
                current = facts[0]["schema"] == SCHEMA
                key = _key(facts[0].get("key", ""))
                yield Entry(path, status.st_size, used, key, facts[1], "" if current else "of another version")


def prune(
    folder: Path, *, everything: bool = False, older_than: float | None = None, max_size: int | None = None
) -> tuple[list[Entry], list[Entry]]:
    """Choose what to remove; damaged entries and leftovers of killed writers always are.

    Args:
        folder: The store's folder.
        everything: Every entry.
        older_than: Entries that were not used for so many days.
        max_size: The least recently used entries, until the rest has at most so many bytes.

    Returns:
        What is to be removed, with the reason in ``why``, and what stays; :func:`remove` removes.
    """
    gone = [
        Entry(path, path.stat().st_size, 0.0, {}, (), "left by a writer that was killed")
        for path in _own(folder, LEFTOVER)
        if _ENTRY.fullmatch(name := LEFTOVER.sub(r"\1.safetensors", path.name)) and _unlocked(folder / name)
    ]
    stay: list[Entry] = []
    left = max_size
    oldest = None if older_than is None else time.time() - older_than * DAY
    for entry in entries(folder):
        why = entry.why
        if not why and everything:
            why = "all"
        if not why and oldest is not None and entry.used < oldest:
            why = "not used for long"
        if not why and read_entry(entry.path) is None:
            why = "damaged"
        if not why and left is not None and entry.size > left:
            why, left = "over the size", -1  # what was used before this one goes too
        if why:
            gone.append(Entry(entry.path, entry.size, entry.used, entry.key, entry.shape, why))
        else:
            stay.append(entry)
            left = None if left is None else left - entry.size
    return gone, stay


def remove(folder: Path, gone: list[Entry]) -> None:
    """Remove the files of ``gone`` from the store, and the locks that nobody holds of entries that are not there.

    Raises:
        DataError: If a file cannot be removed.
    """
    try:
        for entry in gone:
            entry.path.unlink(missing_ok=True)
        for lock in _own(folder / LOCKS, _LOCK):
            entry_path = folder / f"{lock.stem}.safetensors"
            if not entry_path.exists() and _unlocked(entry_path):
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be removed: {error.strerror}. Remove it yourself: rm -r {folder}"
        ) from error


def _own(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the regular files in ``folder`` whose whole name matches: nothing else there is the store's."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if name.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    )


def _header(path: Path) -> tuple[dict[str, str], tuple[int, ...]] | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            shape = tuple(file.get_slice("features").get_shape()) if "features" in names else ()
            return file.metadata() or {}, shape
    except (SafetensorError, OSError):
        return None


def _key(text: str) -> dict[str, Any]:
    try:
        key = json.loads(text)
    except ValueError:
        return {}
    return key if isinstance(key, dict) else {}


def _unlocked(entry: Path) -> bool:
    """Return whether nobody is writing ``entry``."""
    if not lock_of(entry).is_file():
        return True
    try:
        with FileLock(lock_of(entry), timeout=0):
            return True
    except (Timeout, OSError):
        return False
