"""Unpacking of untrusted archives: extracted files, refused members, limits."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.datasets.archives import Files, tar_of, tree, zip_of
from vlprompt.datasets.acquire import unpack as unpack_module
from vlprompt.datasets.acquire.unpack import gunzip, unpack
from vlprompt.errors import DataError


def tar_with(change: Callable[[tarfile.TarInfo], None], name: str = "a.txt") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        archive.addfile(good, io.BytesIO(b"good"))
        info = tarfile.TarInfo(name)
        change(info)
        archive.addfile(info)
    return stream.getvalue()


def as_link(kind: bytes, to: str) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, to

    return change


def zip_with_link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("good.txt", b"good")
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


HOSTILE = {
    "tar absolute": (tar_of({"good.txt": b"", "/etc/x": b"x"}), "is absolute"),
    "tar up": (tar_of({"good.txt": b"", "../x": b"x"}), "leaves the image folder"),
    "tar up inside": (tar_of({"good.txt": b"", "a/../../x": b"x"}), "leaves the image folder"),
    "tar drive": (tar_of({"good.txt": b"", "C:/x": b"x"}), "is absolute"),
    "tar backslash": (tar_of({"good.txt": b"", "..\\x": b"x"}), "backslash"),
    "tar symlink out": (tar_with(as_link(tarfile.SYMTYPE, "/etc/passwd")), "a link out of the archive"),
    "tar symlink up": (tar_with(as_link(tarfile.SYMTYPE, "../outside.txt")), "a link out of the archive"),
    "tar hard link out": (tar_with(as_link(tarfile.LNKTYPE, "/etc/passwd")), "a link out of the archive"),
    "tar fifo": (tar_with(as_link(tarfile.FIFOTYPE, "")), "a device"),
    "tar character device": (tar_with(as_link(tarfile.CHRTYPE, "")), "a device"),
    "tar link to itself": (tar_with(as_link(tarfile.SYMTYPE, "a.txt")), ""),
    "zip up": (zip_of({"good.txt": b"", "../x": b"x"}), "leaves the image folder"),
    "zip absolute": (zip_of({"good.txt": b"", "/x": b"x"}), "is absolute"),
    "zip link": (zip_with_link(), "a link or a device"),
    "file in the way": (tar_of({"a": b"x", "a/b": b"y"}), ""),
    "truncated tar.gz": (tar_of({f"{n}": os.urandom(2000) for n in range(9)})[:9000], "damaged"),
    "truncated zip": (zip_of({"a": os.urandom(2000)})[:1500], "neither a tar nor a zip"),
    "no archive": (b"<html>log in</html>", "neither a tar nor a zip"),
    "empty": (tar_of({}), "contains nothing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    data, match = HOSTILE[name]
    (tmp_path / "toy.tar").write_bytes(data)
    (tmp_path / "outside.txt").write_text("outside")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=match or "toy.tar|in failed") as caught:
        unpack(tmp_path / "toy.tar", tmp_path / "in")
    assert str(tmp_path) in str(caught.value)
    assert tree(tmp_path) == before and not list((tmp_path / "in").iterdir())


def test_a_tar_file_that_ends_with_a_zip_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a": b"a", "b.zip": zip_of({"x": b"x"})}, "w"))
    assert unpack(tmp_path / "a.tar", tmp_path / "out").made == ["a", "b.zip"]


def test_a_link_inside_becomes_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_with(as_link(tarfile.SYMTYPE, "good.txt"), "link.txt"))
    assert unpack(tmp_path / "a.tar", tmp_path / "out").files == 2
    copy = tmp_path / "out" / "link.txt"
    assert copy.read_bytes() == b"good" and not copy.is_symlink()


def test_modes_and_owners_of_an_archive_are_ignored(tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.mode, info.uid = 0o4777, 12345

    (tmp_path / "a.tar").write_bytes(tar_with(change))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    status = (tmp_path / "out" / "a.txt").stat()
    assert status.st_mode & 0o7111 == 0 and status.st_uid == os.getuid()


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_limits(pack: Callable[[Files], bytes], tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(pack({"a": bytes(2_000_000), "b": b"", "c": b""}))
    with pytest.raises(DataError, match="contains more bytes"):
        unpack(tmp_path / "bomb", tmp_path / "out", most_bytes=1_000_000)
    with pytest.raises(DataError, match="contains more files"):
        unpack(tmp_path / "bomb", tmp_path / "out", most_files=2)
    assert not list((tmp_path / "out").iterdir())
    assert unpack(tmp_path / "bomb", tmp_path / "out").files == 3
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2_000_000)))
    with pytest.raises(DataError, match="contains more bytes"):
        gunzip(tmp_path / "bomb.gz", tmp_path / "bomb.idx", most_bytes=1_000_000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"idx")[:-4])
    with pytest.raises(DataError, match="bomb.gz cannot be decompressed"):
        gunzip(tmp_path / "bomb.gz", tmp_path / "bomb.idx")
    assert not (tmp_path / "bomb.idx").exists()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip that shrank 1000 times": (lambda: zip_of({"a": bytes(2**22)}, zipfile.ZIP_DEFLATED), "more than 100 times"),
    "tar that shrank 1000 times": (lambda: tar_of({"a": bytes(2**22)}), "more than 100 times"),
    "extended header": (lambda: tar_of_header(tarfile.XHDTYPE), "a header of 70,000 bytes"),
    "global header": (lambda: tar_of_header(tarfile.XGLTYPE), "a header of 70,000 bytes"),
    "long name": (lambda: tar_of_header(tarfile.GNUTYPE_LONGNAME), "a header of 70,000 bytes"),
    "long link": (lambda: tar_of_header(tarfile.GNUTYPE_LONGLINK), "a header of 70,000 bytes"),
    "folders": (lambda: tar_of_folders(31), "more folders than any data set"),
    "deep folders": (lambda: tar_of({"/".join("x" * 40): b"a"}), "more folders than any data set"),
    "folders in a zip": (lambda: zip_of({f"{number}/": b"" for number in range(31)}), "more folders than any data set"),
    "skipped members": (lambda: tar_of({"other/a": bytes(2**22), "top/b": b"b"}), "more than 100 times"),
}


def tar_of_header(kind: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        info = tarfile.TarInfo("a")
        info.type, info.size = kind, 70_000
        archive.addfile(info, io.BytesIO(bytes(info.size)))
        archive.addfile(tarfile.TarInfo("b"))
    return stream.getvalue()


def tar_of_folders(count: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for number in range(count):
            info = tarfile.TarInfo(str(number))
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in (("_UNSUSPICIOUS", 2**20), ("_LARGEST_HEADER", 2**16), ("_MOST_FOLDERS", 30)):
        monkeypatch.setattr(unpack_module, limit, value)
    make, match = BOMBS[name]
    (tmp_path / "bomb").write_bytes(make())
    with pytest.raises(DataError, match=match) as caught:
        unpack(tmp_path / "bomb", tmp_path / "out", strip="top" if "skipped" in name else "")
    assert str(caught.value).count("\n") == 0
    assert not list((tmp_path / "out").iterdir())


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({"a": bytes(10_000)}))
    now = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(unpack_module, "_RESERVE", now.free - 5_000)
    monkeypatch.setattr(unpack_module.shutil, "disk_usage", lambda _: now)
    with pytest.raises(DataError, match="more bytes than are free"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_strip_and_inner_must_exist(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({"x/y/a": b"a", "xy/b": b"b", "x/c": b"c"}))
    with pytest.raises(DataError, match=re.escape("contains nothing under 'z'")):
        unpack(tmp_path / "a.zip", tmp_path / "out", strip="z")
    with pytest.raises(DataError, match="does not contain 'inner.tar': it is not the published one"):
        unpack(tmp_path / "a.zip", tmp_path / "out", inner="inner.tar")
    assert unpack(tmp_path / "a.zip", tmp_path / "out", strip="x/y").made == ["a"]
    assert tree(tmp_path / "out") == {"a": b"a"}
