"""Decoding image bytes to RGB: accepted and refused images, and error texts."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlprompt.datasets import FileSource, ZipSource, decode_rgb
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
