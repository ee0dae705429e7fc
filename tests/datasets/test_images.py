"""Decoding image bytes to RGB: accepted and refused images, and error texts."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlprompt.datasets import FileSource, ZipSource, decode_rgb, images
from vlprompt.errors import DataError


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png")]
)
def test_every_mode_becomes_rgb_at_once(mode: str, suffix: str, tmp_path: Path, paint: Callable[..., Path]) -> None:
    path = paint(tmp_path / f"image.{suffix}", 5, mode)
    decoded = FileSource(str(path)).open()
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(path).convert("RGB")))


def test_grey_gives_three_equal_channels(tmp_path: Path, paint: Callable[..., Path]) -> None:
    pixels = np.asarray(FileSource(str(paint(tmp_path / "grey.png", 3, "L"))).open())
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("keep", [0, 3, 100, -30])
def test_damaged_files_name_file_size_and_first_bytes(keep: int, tmp_path: Path, paint: Callable[..., Path]) -> None:
    path = paint(tmp_path / "broken.jpg", 9, size=(200, 200))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError) as caught:
        FileSource(str(path)).open()
    text = str(caught.value)
    assert str(path) in text and f"{path.stat().st_size:,} bytes" in text
    assert ("ff d8 ff" in text) if keep else ("(nothing)" in text)


def test_files_that_are_not_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown image format.*accepted formats: JPEG"):
        decode_rgb(b"<html>not found</html>", "page.jpg")
    with pytest.raises(DataError, match="gone.png cannot be read: No such file"):
        FileSource(str(tmp_path / "gone.png")).open()
    with pytest.raises(DataError, match="gone.png cannot be read"):
        FileSource(str(tmp_path / "gone.png")).stamp()


def test_postscript_is_never_run() -> None:
    with pytest.raises(DataError, match="unknown image format"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "x.eps")


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused(size: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="too large to decode safely"):
        decode_rgb(bytes(data), "bomb.png")


def test_a_bomb_in_the_text_of_a_png() -> None:
    stream, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 80_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(stream, "PNG", pnginfo=info)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_rgb(stream.getvalue(), "text.png")


def test_sixteen_bits_are_refused() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(stream, "PNG")
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        decode_rgb(stream.getvalue(), "deep.png")


def test_zip_sources(tmp_path: Path, paint: Callable[..., Path]) -> None:
    path = paint(tmp_path / "a.png", 7)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, "x/a.png")
        archive.writestr("x/bad.png", b"no")
    source = ZipSource(str(tmp_path / "all.zip"), "x/a.png")
    assert np.array_equal(np.asarray(source.open()), np.asarray(FileSource(str(path)).open()))
    assert source.stamp().startswith(f"{path.stat().st_size}-")
    with pytest.raises(DataError, match="all.zip:x/bad.png cannot be decoded"):
        ZipSource(str(tmp_path / "all.zip"), "x/bad.png").open()
    with pytest.raises(DataError, match="x/none.png cannot be read"):
        ZipSource(str(tmp_path / "all.zip"), "x/none.png").open()
    with pytest.raises(DataError, match="all.zip:x/none.png cannot be read"):
        ZipSource(str(tmp_path / "all.zip"), "x/none.png").stamp()


def test_files_and_members_larger_than_any_image_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.png"
    path.touch()
    os.truncate(path, 20 * 2**30)
    with pytest.raises(DataError, match="21,474,836,480 bytes; at most"):
        FileSource(str(path)).open()
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1001))
    with pytest.raises(DataError, match="1,001 bytes; at most 1,000"):
        ZipSource(str(tmp_path / "a.zip"), "bomb.png").open()


@pytest.mark.parametrize("field", ["encrypted", "method", "bytes", "checksum"])
def test_members_that_cannot_be_read_are_errors(field: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5000))
    data = bytearray(stream.getvalue())
    central = data.index(b"PK\x01\x02")
    changes = {"encrypted": [(6, 1), (central + 8, 1)], "method": [(8, 77), (central + 10, 77)]}
    for place, value in changes.get(field, [(central + 16, 1)] if field == "checksum" else [(38, 255), (39, 255)]):
        data[place] = value
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match="a.zip:a.png cannot be read"):
        ZipSource(str(tmp_path / "a.zip"), "a.png").open()
