"""Listing and pruning of a feature store: damaged entries, leftovers, and least recently used entries."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlprompt._files import LEFTOVER, locked, parse_json
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
        size: Size in bytes.
        used: Time of the last use, in seconds since 1970.
        key: Everything the features depend on; empty if it cannot be read.
        shape: Shape of the features.
        why: Reason to remove it; empty for a valid entry.
    """

    path: Path
    size: int
    used: float
    key: dict[str, Any]
    shape: tuple[int, ...]
    why: str = ""


def entries(folder: Path) -> list[Entry]:
    """Return the store's entries, most recently used first. Checksums are not compared."""
    return sorted(_entries(folder), key=lambda entry: (-entry.used, entry.path.name))


def _entries(folder: Path) -> Iterator[Entry]:
    for path in _matching(folder, _ENTRY):
        with contextlib.suppress(FileNotFoundError):  # another process pruned it
            status = path.stat()
            used = max(status.st_atime, status.st_mtime)
            facts = _header(path)
            with contextlib.suppress(OSError):  # listing does not count as use
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
    """Choose the entries to remove; damaged entries and leftovers of killed writers are always among them.

    Args:
        folder: The store's folder.
        everything: Remove every entry.
        older_than: Remove entries that were not used for this many days.
        max_size: Remove the least recently used entries until the rest has at most this many bytes.

    Returns:
        The entries to remove, with the reason in ``why``, and those to keep; :func:`remove` removes the former.
    """
    removed = [
        Entry(path, path.stat().st_size, 0.0, {}, (), "left by a writer that was killed")
        for path in _matching(folder, LEFTOVER)
        if _ENTRY.fullmatch(name := LEFTOVER.sub(r"\1.safetensors", path.name)) and _unlocked(folder / name)
    ]
    kept: list[Entry] = []
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
            why, left = "over the size", -1  # entries that were used earlier are removed too
        if why:
            removed.append(Entry(entry.path, entry.size, entry.used, entry.key, entry.shape, why))
        else:
            kept.append(entry)
            left = None if left is None else left - entry.size
    return removed, kept


def remove(folder: Path, removed: list[Entry]) -> None:
    """Remove the files of these entries, and unused lock files of entries that do not exist.

    Raises:
        DataError: If a file cannot be removed.
    """
    try:
        for entry in removed:
            entry.path.unlink(missing_ok=True)
        for lock in _matching(folder / LOCKS, _LOCK):
            entry_path = folder / f"{lock.stem}.safetensors"
            if not entry_path.exists() and _unlocked(entry_path):
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be removed: {error.strerror}. Remove the store: rm -r {folder}"
        ) from error


def _matching(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the regular files in ``folder`` whose complete name matches; other files do not belong to the store."""
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
        key = parse_json(text)
    except ValueError:
        return {}
    return key if isinstance(key, dict) else {}


def _unlocked(entry: Path) -> bool:
    """Return whether no process is writing ``entry``."""
    if not lock_of(entry).is_file():
        return True
    try:
        with locked(lock_of(entry), timeout=0):
            return True
    except OSError:
        return False
