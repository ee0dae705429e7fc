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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vlprompt.datasets.paths import path_problem
from vlprompt.errors import DataError

#: Limits above the largest published data sets (DomainNet has 600,000 files, ImageNet 150 GB).
MOST_FILES, MOST_BYTES = 5_000_000, 500 * 2**30
#: Largest number of folders, for which an archive needs hardly any bytes (ImageNet has 22,000).
_MOST_FOLDERS = 200_000
#: Archives of images hardly shrink. More bytes than this, and than this many times the archive, are refused.
_UNSUSPICIOUS, _MOST_RATIO = 2**28, 100
#: Bytes that remain free on the disk.
_RESERVE = 2**28
#: Largest header of extended attributes or long names in a tar file, which is read into memory.
_LARGEST_HEADER = 2**20
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
    """What an archive may still contain; ``limit`` names the limit of its bytes."""

    archive: Path
    files: int = MOST_FILES
    size: int = MOST_BYTES
    limit: str = "more bytes than any data set"
    copied: int = 0
    folders: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, archive: Path, target: Path, files: int, size: int) -> _Budget:
        """Return the budget of unpacking ``archive`` into ``target``: the least of all limits."""
        packed = archive.stat().st_size
        limits = [
            (size, "more bytes than any data set"),
            (max(_UNSUSPICIOUS, packed * _MOST_RATIO), f"more than {_MOST_RATIO} times its own {packed:,} bytes"),
            (shutil.disk_usage(target).free - _RESERVE, f"more bytes than are free in {target}"),
        ]
        return cls(archive, files, *min(limits, key=lambda limit: limit[0]))

    def take(self, files: int = 0, size: int = 0) -> None:
        """Count members and bytes.

        Raises:
            DataError: A limit is exceeded.
        """
        self.files -= files
        self.size -= size
        if self.files < 0 or self.size < 0:
            raise self._refusal("more files than any data set" if self.files < 0 else self.limit)

    def make(self, stage: Path, folder: str) -> None:
        """Make a folder, with those above it, in ``stage``.

        Raises:
            DataError: There are too many folders.
        """
        if folder not in self.folders:
            steps = folder.split("/")
            self.folders.update("/".join(steps[:count]) for count in range(1, len(steps) + 1) if folder)
            if len(self.folders) > _MOST_FOLDERS:
                raise self._refusal("more folders than any data set")
            (stage / folder).mkdir(parents=True, exist_ok=True)

    def _refusal(self, what: str) -> DataError:
        return DataError(f"Archive {self.archive} is refused: it contains {what}.")


class _Member(tarfile.TarInfo):
    """A member of a tar file, whose header has a limited size."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile reads these headers into memory whatever size they state.
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
        if self.type in headers and self.size > _LARGEST_HEADER:
            raise DataError(f"Archive {archive.name!s} is refused: it contains a header of {self.size:,} bytes.")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


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
    with _stage(target) as stage:
        budget = _Budget.of(archive, target, most_files, most_bytes)
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
        return Unpacked(made, budget.copied, kept)


def gunzip(packed: Path, target: Path, most_bytes: int = MOST_BYTES) -> None:
    """Decompress a file to ``target``, which must not exist."""
    with _stage(target.parent) as stage:
        try:
            with gzip.open(packed, "rb") as source:
                _copy(source, stage, target.name, _Budget.of(packed, target.parent, 1, most_bytes))
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
        if _is_tar(archive):
            _extract_tar(archive, stage, strip, budget)
        elif zipfile.is_zipfile(archive):
            _extract_zip(archive, stage, strip, budget)
        else:
            raise DataError(f"{archive} is neither a tar nor a zip file.")
    except _DAMAGED as error:
        raise DataError(f"Archive {archive} is damaged or not accepted: {str(error)[:200]}. Fetch it again.") from error


def _is_tar(archive: Path) -> bool:
    """Return whether the file is a tar file; :func:`tarfile.is_tarfile` reads headers of any size."""
    try:
        with tarfile.open(archive, "r:*", tarinfo=_Member):
            return True
    except tarfile.TarError:
        return False


def _extract_tar(archive: Path, stage: Path, strip: str, budget: _Budget) -> None:
    with tarfile.open(archive, "r:*", tarinfo=_Member) as members:
        for member in members:
            place = _place(member.name, archive, strip)
            budget.take(files=1)
            if place is None:
                budget.take(size=member.size)  # it is decompressed nevertheless
                continue
            if member.isdir():
                budget.make(stage, place)
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
                _copy(source, stage, place, budget)


def _extract_zip(archive: Path, stage: Path, strip: str, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as members:
        infos = members.infolist()
        _Budget(archive, budget.files, budget.size, budget.limit).take(
            len(infos), sum(info.file_size for info in infos)
        )
        for info in infos:
            place = _place(info.filename, archive, strip)
            budget.take(files=1)
            if place is None:
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"Archive {archive} is refused: {info.filename[:80]!r} is a link or a device.")
            if info.is_dir():
                budget.make(stage, place)
                continue
            with members.open(info) as source:
                _copy(source, stage, place, budget)


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


def _copy(source: IO[bytes] | gzip.GzipFile, stage: Path, place: str, budget: _Budget) -> None:
    budget.make(stage, place.rpartition("/")[0])
    budget.copied += 1
    with open(stage / place, "wb") as stream:
        while chunk := source.read(_CHUNK):
            budget.take(size=len(chunk))
            stream.write(chunk)


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
