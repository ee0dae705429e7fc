"""Webdataset tar files: members, images read by offset, and a cached index of the offsets.

A tar file has no table of contents. The first pass stores the offset of every image in an index in the cache folder.
Images can then be read in any order and in any process without a second pass. Nothing is unpacked to disk.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlprompt._files import (
    file_checksum,
    home_path,
    open_regular,
    parse_json,
    read_bytes,
    sha256_bytes,
    sha256_json,
    sha256_text,
    write_text,
)
from vlprompt.datasets.images import HASHED_BYTES, IMAGE_SUFFIXES, MAX_BYTES, PLAIN, Reading, decode_rgb
from vlprompt.datasets.passed import PassedOver
from vlprompt.datasets.paths import path_problem
from vlprompt.datasets.report import Report
from vlprompt.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Endings of members that are images.
IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
MOST_SHARDS = 100_000
#: Largest member that is read as a label or a text, in bytes.
LARGEST_TEXT = 2**20
_LARGEST_INDEX = 2**30
#: webdataset's rule: the key is the path up to the first dot of the file name.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^/.]*)\.([^/]+)$")
#: Index of shards, as JSON values.
Index = dict[str, Any]


@dataclass(frozen=True)
class ShardSource:
    """An image inside a tar file.

    Attributes:
        path: The tar file.
        offset: Offset of the image's first byte.
        size: Number of bytes.
        key: Key of the image in the shard.
    """

    path: str
    offset: int
    size: int
    key: str
    reading: Reading = PLAIN

    def open(self) -> Image:
        """Decode the image. Raises :class:`~vlprompt.errors.DataError` that names it."""
        return decode_rgb(*self.encoded(), self.reading)

    def encoded(self) -> tuple[bytes, str]:
        """Return the bytes of the image and its name."""
        name = f"{self.path}:{self.key}"
        try:
            # Opened for every image: an open file would share its position with forked workers and threads.
            with open_regular(self.path) as stream:
                stream.seek(self.offset)
                data = stream.read(min(self.size, MAX_BYTES + 1))
        except OSError as error:
            raise DataError(f"Image {name} cannot be read: {error.strerror or error}.") from error
        if self.size > MAX_BYTES:
            raise DataError(f"Image {name} has {self.size:,} bytes; at most {MAX_BYTES:,} are read.")
        if len(data) < self.size:
            raise DataError(f"Image {name} cannot be read: the shard is truncated. Fetch the shard again.")
        return data, name

    def stamp(self) -> str:
        """Return size and modification time of the shard, and the image's offset."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"Shard {self.path} cannot be read: {error.strerror or error}.") from error
        return self.reading.stamped(f"{status.st_size}-{status.st_mtime_ns}-{self.offset}")

    def stored_bytes(self) -> int:
        """Return the number of bytes of the image."""
        return self.size

    def content(self) -> str:
        """Return the SHA-256 of the image's bytes."""
        return self.reading.stamped(sha256_bytes(self.encoded()[0]))


class Member(NamedTuple):
    """A plain file in a shard; ``data`` is its content if requested and not too large."""

    name: str
    key: str
    ending: str
    offset: int
    size: int
    data: bytes | None


def members(path: Path, name: str, texts: Sequence[str], report: Report) -> Iterator[Member]:
    """Read one shard and yield its plain files that have an ending, in order.

    Links, devices, invalid paths (rule S04) and truncated members are added to ``report``.

    Args:
        path: The shard.
        name: Name of the shard in problem texts.
        texts: Endings, in lower case, of the members to read.
        report: Collects the problems.
    """
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:  # "r:": images in a compressed file have no offset
            for member in archive:
                member_path = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    text = f"{member_path[:80]!r} is a link, a device or sparse; only plain files are read"
                    report.error("S04", f"{name}: {text}")
                elif problem := path_problem(member_path):
                    report.error("S04", f"{name}: {problem}")
                elif (match := _MEMBER.match(member_path)) is None:
                    report.passed.add(member_path)
                else:
                    if member.offset_data + member.size > size:
                        report.error("S01", f"{name} ends within {member.name}")
                        continue
                    ending = match[2].lower()
                    wanted = ending.rpartition(".")[2] in texts and member.size <= LARGEST_TEXT
                    stream = archive.extractfile(member) if wanted else None
                    data = None if stream is None else stream.read()
                    yield Member(member_path, match[1], ending, member.offset_data, member.size, data)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        report.error("S01", f"shard {name} cannot be read as a plain tar file: {str(error)[:200]}")


def by_key(path: Path, name: str, texts: Sequence[str], report: Report) -> dict[str, dict[str, Member]]:
    """Return the images and texts of a shard by key and kind: ``image``, or the ending of a text; in the shard's order.

    The key ends at the first dot of a file name, as in webdataset. A name with several dots, such as ``v1.3 rose.png``,
    is an image of its own if a text has the same name up to the last dot; otherwise it is a further field of another
    key (``0001.mask.png``). Further fields and members of other endings are counted as passed over.

    Args:
        path: The shard.
        name: Name of the shard in problem texts.
        texts: Endings, in lower case, of the members to read.
        report: Collects the problems, among them a key that has two images or two texts of one ending (rule S11).
    """
    plain: dict[str, dict[str, Member]] = {}
    dotted: dict[str, dict[str, Member]] = {}
    others: list[Member] = []

    for member in members(path, name, texts, report):
        _, dot, last = member.ending.rpartition(".")
        kind = "image" if last in IMAGES else last
        if kind != "image" and kind not in texts:
            others.append(member)
            continue
        key = member.name[: -len(last) - 1] if dot else member.key
        of_key = (dotted if dot else plain).setdefault(key, {})
        if kind in of_key:
            report.error("S11", f"{name}: {key} occurs twice ({member.ending})")
        of_key[kind] = member
    for key, kinds in dotted.items():
        if "image" in kinds and len(kinds) > 1:
            plain[key] = {kind: member._replace(key=key) for kind, member in kinds.items()}
        else:
            others += kinds.values()
    for member in others:
        report.passed.add(member.name, "." + member.ending)
    # Keys of both forms in the order of their first members.
    return dict(sorted(plain.items(), key=lambda item: min(member.offset for member in item[1].values())))


def kept_index(
    shards: Sequence[Path],
    about: Sequence[Any],
    check: Callable[[Any], Index],
    read: Callable[[], Index],
    report: Report,
) -> Index:
    """Return the index of ``shards``, from the cache if it is stored there.

    An index of shards with problems is not stored.

    Args:
        shards: The files; their content, or for more than 256 MB their sizes and times, is part of the key.
        about: Kind of the index, as JSON values; part of the key.
        check: Returns a stored index, or raises ValueError, KeyError or TypeError if it is damaged.
        read: Reads the shards and returns their index.
        report: Collects the problems.
    """
    key = sha256_text(json.dumps([*about, _states(shards)]))
    cache = os.environ.get("VLPROMPT_CACHE") or "~/.cache/vlprompt"
    file = home_path(cache) / "shards" / f"{key}.json"
    try:
        stored = parse_json(read_bytes(file, _LARGEST_INDEX))
        if stored.pop("sha256") != sha256_json(stored):
            raise ValueError("it was changed")
        index, passed = check(stored), _passed(stored["passed"])
        report.passed.merge(*passed)
        return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # missing or damaged: the shards are read again
    before, of_others, found = len(report.problems), report.passed, PassedOver()
    report.passed = found
    try:
        content = read()
    finally:
        report.passed = of_others
        report.passed.merge(found.content(), found.litter)
    content["passed"] = {"kinds": found.content(), "litter": found.litter}
    if len(report.problems) == before:
        _store(file, {**content, "sha256": sha256_json(content)})
    return content


def _states(shards: Sequence[Path]) -> list[tuple[str, str]]:
    """Return for each shard a text that follows its content, or its size and time if it is large or unreadable."""
    status = [path.stat() for path in shards]
    states = [(str(path), f"{stat.st_size}-{stat.st_mtime_ns}") for path, stat in zip(shards, status, strict=True)]
    if sum(stat.st_size for stat in status) > HASHED_BYTES:
        return states
    try:
        return [(str(path), file_checksum(path)) for path in shards]
    except OSError:  # the reader reports the problem
        return states


def _passed(value: Any) -> tuple[dict[str, tuple[int, str]], int]:
    """Return the stored counts of members that were passed over; raises ValueError, KeyError or TypeError."""
    kinds = {kind: (whole(number), example) for kind, (number, example) in value["kinds"].items()}
    if not all(isinstance(example, str) for _, example in kinds.values()):
        raise ValueError("an example is not a text")
    return kinds, whole(value["litter"])


def checked_place(value: Any, shards: int) -> tuple[int, int, int, str]:
    """Return shard number, offset, size and name of an image in a stored index; raises ValueError or TypeError."""
    number, offset, size, name = value
    if not isinstance(name, str) or path_problem(name) or not whole(number) < shards:
        raise ValueError(f"{value!r} is not an index entry")
    return number, whole(offset), whole(size), name


def whole(value: Any) -> int:
    """Return ``value`` if it is a whole number from 0, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _store(file: Path, content: Index) -> None:
    try:
        write_text(file, json.dumps(content))
    except OSError as error:
        text = f"The index of the shards cannot be stored in {file.parent} ({error}); the shards are read every time."
        warnings.warn(f"{text} Give another folder: export VLPROMPT_CACHE=FOLDER", stacklevel=2)
