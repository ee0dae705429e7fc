"""Image sources and decoding to RGB."""

from __future__ import annotations

import functools
import io
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vlprompt._files import open_regular, read_bytes
from vlprompt.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

#: File name suffixes, in lower case, that folder readers accept as images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
#: Accepted Pillow formats. Other decoders are unsafe on untrusted files (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: Largest image that is decoded, in pixels: Pillow's bound, about 89 million.
MAX_PIXELS = 89_478_485
#: Largest image file that is read, in bytes: four bytes for each pixel, uncompressed.
MAX_BYTES = 4 * MAX_PIXELS + 2**20
#: Exceptions of :mod:`zipfile` on damaged, encrypted and unsupported archives and members.
ZIP_ERRORS = (OSError, KeyError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile,
              zlib.error, lzma.LZMAError)  # fmt: skip


class ImageSource(Protocol):
    """Interface of an object that an image can be read from."""

    def open(self) -> Image:
        """Return the decoded RGB image."""

    def stamp(self) -> str:
        """Return a short text that changes when the bytes change; reads no image data."""


@dataclass(frozen=True)
class FileSource:
    """An image file on disk."""

    path: str

    def open(self) -> Image:
        """Decode the file. Raises :class:`~vlprompt.errors.DataError` that names it."""
        try:
            data = read_bytes(self.path, MAX_BYTES)
        except OSError as error:
            raise DataError(f"Image {self.path} cannot be read: {error.strerror or error}.") from error
        return decode_rgb(data, self.path)

    def stamp(self) -> str:
        """Return size and modification time."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"Image {self.path} cannot be read: {error.strerror or error}.") from error
        return f"{status.st_size}-{status.st_mtime_ns}"


@dataclass(frozen=True)
class ZipSource:
    """An image inside a zip archive."""

    archive: str
    member: str

    def open(self) -> Image:
        """Decode the member. Raises :class:`~vlprompt.errors.DataError` that names it."""
        name = f"{self.archive}:{self.member}"
        try:
            archive = _archive(self.archive, os.getpid())
            info = archive.getinfo(self.member)
            if info.file_size > MAX_BYTES:  # zipfile reads no more than this size
                raise ValueError(f"it has {info.file_size:,} bytes; at most {MAX_BYTES:,} are read")
            data = archive.read(info)
        except ZIP_ERRORS as error:
            raise DataError(f"Image {name} cannot be read: {error}.") from error
        return decode_rgb(data, name)

    def stamp(self) -> str:
        """Return size and checksum from the archive's table of contents."""
        try:
            info = _archive(self.archive, os.getpid()).getinfo(self.member)
        except ZIP_ERRORS as error:
            raise DataError(f"Image {self.archive}:{self.member} cannot be read: {error}.") from error
        return f"{info.file_size}-{info.CRC:08x}"


@functools.lru_cache(maxsize=16)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # Keyed by process: a forked worker shares the file position of an archive opened before the fork.
    return zipfile.ZipFile(open_regular(path))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; real problems raise below
        yield


def decode_rgb(data: bytes, name: str) -> Image:
    """Decode image bytes to 8-bit RGB.

    The conversion precedes every other operation, as in Dassl: a palette or RGBA image that is resized before
    conversion has different pixels. EXIF orientation is ignored, as in all published protocols.

    Args:
        data: The content of the file.
        name: Name of the image in error messages.

    Returns:
        A loaded PIL image of mode ``RGB``.

    Raises:
        DataError: If the bytes are not an image of a known format, are truncated, or have more than ``MAX_PIXELS``
            pixels or more than 8 bits per channel. The text gives name, size and first bytes.
    """
    from PIL import Image

    described = f"{len(data):,} bytes, beginning {data[:8].hex(' ') or '(nothing)'}"
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            mode = image.mode
            converted = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(
            f"Image {name} is too large to decode safely ({error}; at most {MAX_PIXELS:,} pixels are accepted). "
            "Scale it down first."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on a damaged file
        raise DataError(
            f"Image {name} cannot be decoded ({described}): {_first_line(error)}. Replace or remove the file; accepted "
            f"formats: {', '.join(FORMATS)}."
        ) from error
    if mode.startswith(("I", "F")):
        raise DataError(
            f"Image {name} has more than 8 bits per channel (Pillow mode {mode}). Converting it would clip "
            "the brightness silently: scale it to 8 bits per channel first."
        )
    return converted


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = (text[0] if text else type(error).__name__).rstrip(".")
    return "unknown image format" if first.startswith("cannot identify") else first[:200]
