"""Unpacking of untrusted archives: into a temporary folder first, then to the target without replacing files.

Only plain files and folders are created, by copying bytes. Links, devices, owners and permissions are never extracted.
A link to another member becomes a copy of that member.
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vlprompt.datasets.paths import path_problem
from vlprompt.errors import DataError

#: Limits above the largest published data sets (DomainNet has 600,000 files, ImageNet 150 GB).
MOST_FILES, MOST_BYTES = 5_000_000, 500 * 2**30
_CHUNK = 2**20
#: Exceptions of damaged archives and compressed streams.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RecursionError, RuntimeError,
            NotImplementedError, ValueError, KeyError)  # fmt: skip


@dataclass
class Unpacked:
    """Result of unpacking.

    Attributes:
        made: Names of the files and folders that the archive adds to the target folder.
        files: Number of files in the archive.
        kept: Existing files that were not replaced, by their path in the target folder.
    """

    made: list[str]
    files: int
    kept: list[str]


@dataclass
class _Budget:
    files: int = MOST_FILES
    size: int = MOST_BYTES


def unpack(archive: Path, target: Path, *, strip: str = "", inner: str | None = None,
           most_files: int = MOST_FILES, most_bytes: int = MOST_BYTES) -> Unpacked:  # fmt: skip
    """Unpack a tar file, compressed or not, or a zip file.

    Args:
        archive: The file; it is not changed.
        target: Folder for the members.
        strip: Leading folders to drop from member paths; members outside them are skipped.
        inner: An archive inside the archive, which is unpacked into ``target`` instead of copied.
        most_files: Limit on the number of files.
        most_bytes: Limit on the extracted bytes.

    Raises:
        DataError: If the file is not such an archive, is damaged, exceeds a limit, or names a path outside ``target``.
            ``target`` is then unchanged.
    """
    budget = _Budget(most_files, most_bytes)
    with _stage(target) as stage:
        _extract(archive, stage, strip.strip("/"), budget)
        if inner is not None:
            if not (stage / inner).is_file():
                raise DataError(f"Archive {archive} does not contain {inner!r}: it is not the published one.")
            _extract(stage / inner, stage, "", budget)
            (stage / inner).unlink()
        kept: list[str] = []
        made = sorted(os.listdir(stage), key=os.fsencode)
        if not made:
            raise DataError(f"Archive {archive} contains nothing" + (f" under {strip!r}." if strip else "."))
        _merge(stage, target, "", kept)
        return Unpacked(made, most_files - budget.files, kept)


def gunzip(packed: Path, target: Path, most_bytes: int = MOST_BYTES) -> None:
    """Decompress a file to ``target``, which must not exist."""
    with _stage(target.parent) as stage:
        try:
            with gzip.open(packed, "rb") as source:
                _copy(source, stage / target.name, _Budget(1, most_bytes), packed)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{packed} cannot be decompressed: {error}.") from error
        os.rename(stage / target.name, target)


@contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the same disk as ``target`` and remove it afterwards."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Readers of class folders skip names with a leading dot.
        stage = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target))
    except OSError as error:
        raise DataError(f"Folder {target} cannot be written to: {error.strerror or error}.") from error
    try:
        yield stage
    except OSError as error:
        raise DataError(f"Unpacking into {target} failed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _extract(archive: Path, stage: Path, strip: str, budget: _Budget) -> None:
    try:
        # tar first: zip files are recognised by their end, so a tar file that ends with a zip file would match.
        if tarfile.is_tarfile(archive):
            _extract_tar(archive, stage, strip, budget)
        elif zipfile.is_zipfile(archive):
            _extract_zip(archive, stage, strip, budget)
        else:
            raise DataError(f"{archive} is neither a tar nor a zip file.")
    except _DAMAGED as error:
        raise DataError(f"Archive {archive} is damaged or not accepted: {str(error)[:200]}. Fetch it again.") from error


def _extract_tar(archive: Path, stage: Path, strip: str, budget: _Budget) -> None:
    with tarfile.open(archive, "r:*") as members:
        for member in members:
            place = _place(member.name, archive, strip)
            if place is None:
                continue
            if member.isdir():
                (stage / place).mkdir(parents=True, exist_ok=True)
                continue
            # For a link, this returns the target inside the archive; it never opens files on disk.
            try:
                source = members.extractfile(member)
            except KeyError:
                source = None
            if source is None:
                kind = "a link out of the archive" if member.issym() or member.islnk() else "a device"
                raise DataError(f"Archive {archive} is refused: {member.name[:80]!r} is {kind}.")
            with source:
                _copy(source, stage / place, budget, archive)


def _extract_zip(archive: Path, stage: Path, strip: str, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as members:
        for info in members.infolist():
            place = _place(info.filename, archive, strip)
            if place is None:
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"Archive {archive} is refused: {info.filename[:80]!r} is a link or a device.")
            if info.is_dir():
                (stage / place).mkdir(parents=True, exist_ok=True)
                continue
            with members.open(info) as source:
                _copy(source, stage / place, budget, archive)


def _place(name: str, archive: Path, strip: str) -> str | None:
    """Return the path of a member in the target, or None for the archive's root and members outside ``strip``."""
    plain = name.removeprefix("./").rstrip("/")
    if plain in ("", "."):
        return None
    if problem := path_problem(plain):
        raise DataError(f"Archive {archive} is refused: {problem}.")
    if not strip:
        return plain
    return plain[len(strip) + 1 :] if plain.startswith(strip + "/") else None


def _copy(source: IO[bytes] | gzip.GzipFile, target: Path, budget: _Budget, archive: Path) -> None:
    budget.files -= 1
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as stream:
        while budget.files >= 0 and budget.size >= 0 and (chunk := source.read(_CHUNK)):
            budget.size -= len(chunk)
            stream.write(chunk)
    if budget.files < 0 or budget.size < 0:
        unit = "files" if budget.files < 0 else "bytes"
        raise DataError(f"Archive {archive} is refused: it contains more {unit} than any data set.")


def _merge(stage: Path, target: Path, below: str, kept: list[str]) -> None:
    """Move the content of ``stage`` to ``target``; existing files are kept and added to ``kept``."""
    for entry in sorted(os.scandir(stage), key=lambda entry: os.fsencode(entry.name)):
        path, destination = below + entry.name, target / entry.name
        if not os.path.lexists(destination):
            os.rename(entry.path, destination)
        elif entry.is_dir() and destination.is_dir():
            _merge(Path(entry.path), destination, path + "/", kept)
        else:
            kept.append(path)
