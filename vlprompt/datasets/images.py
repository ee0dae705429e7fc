"""Image sources and decoding to RGB."""

from __future__ import annotations

import contextlib
import functools
import io
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from vlprompt._files import open_regular, read_bytes, sha256_bytes
from vlprompt.config.run import BACKGROUNDS, is_background
from vlprompt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

#: File name suffixes, in lower case, that readers accept as images, whatever this Pillow can decode: which files a
#: split has must not depend on what is installed.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
    *(".jp2", ".avif", ".heic", ".heif"),
)
#: Accepted Pillow formats. Other decoders are unsafe on untrusted files (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
#: Brands of ISO media files (bytes 8 to 12) by what decodes them.
_BRANDS = {
    b"avif": "AVIF needs Pillow 11.3 or later: pip install -U pillow",
    b"avis": "AVIF needs Pillow 11.3 or later: pip install -U pillow",
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        "HEIC needs Pillow's plugin: pip install pillow-heif (or vlprompt[heif])",
    ),
}
#: Largest image that is decoded, in pixels: Pillow's bound, about 89 million.
MAX_PIXELS = 89_478_485
#: Largest image file that is read, in bytes: four bytes for each pixel, uncompressed.
MAX_BYTES = 4 * MAX_PIXELS + 2**20
#: Exceptions of :mod:`zipfile` on damaged, encrypted and unsupported archives and members.
ZIP_ERRORS = (OSError, KeyError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile,
              zlib.error, lzma.LZMAError)  # fmt: skip
#: Images of at most this many bytes together are identified by their content: reading them takes a second.
HASHED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Reading:
    """How the pixels of an image are read.

    The default is Pillow's plain conversion, as in all published protocols: an orientation tag is ignored, and a
    transparent pixel has the colour that is stored behind it, mostly black.

    Attributes:
        orientation: ``tag`` turns and mirrors the image as its orientation tag says, ``ignore`` does not.
        background: Colour behind transparent pixels, ``#rrggbb``; ``None`` for the plain conversion.
    """

    orientation: Literal["tag", "ignore"] = "ignore"
    background: str | None = None

    def stamped(self, stamp: str) -> str:
        """Return ``stamp`` of the bytes with the reading; that of the plain reading is unchanged."""
        return stamp if self == PLAIN else f"{stamp} {self.orientation} {self.background}"


#: Colours that have names; ``none`` is the plain conversion.
COLOURS: dict[str, str | None] = {"white": "#ffffff", "black": "#000000", "none": None}
#: Pillow's plain conversion.
PLAIN = Reading()
#: Pixels as viewers show them: upright, on white.
AS_SEEN = Reading("tag", "#ffffff")


class ImageSource(Protocol):
    """Interface of an object that an image can be read from."""

    def open(self) -> Image:
        """Return the decoded RGB image."""

    def stamp(self) -> str:
        """Return a short text that changes when the bytes change; reads no image data."""

    def stored_bytes(self) -> int:
        """Return the number of bytes that :meth:`content` reads; reads no image data."""

    def content(self) -> str:
        """Return the SHA-256 of the stored bytes, and how they are read."""


S = TypeVar("S", bound=ImageSource)
T = TypeVar("T")


def reading_of(*, own: bool, orientation: str | None = None, background: str | None = None) -> Reading:
    """Return the reading of a data set: ``AS_SEEN`` for images of the user, else ``PLAIN``, with the values given.

    Args:
        own: Whether these are images of the user.
        orientation: ``tag`` or ``ignore``; ``None`` for the default.
        background: ``white``, ``black`` or ``#rrggbb``; ``none`` for the plain conversion; ``None`` for the default.

    Raises:
        ConfigError: If a value is not accepted.
    """
    if orientation not in (None, "tag", "ignore"):
        raise ConfigError(f"data.orientation is {orientation!r}; accepted: 'tag' or 'ignore', or None.")
    if background is not None and not is_background(background):
        raise ConfigError(f"data.background is {background!r}; accepted: {BACKGROUNDS}.")
    default = AS_SEEN if own else PLAIN
    colour = COLOURS.get(background, background) if background is not None else default.background
    return Reading(default.orientation if orientation is None else orientation, colour)  # type: ignore[arg-type]


def read_as(source: S, reading: Reading) -> S:
    """Return ``source`` with another reading; images in arrays, which have neither tags nor alpha, are unchanged."""
    inner = getattr(source, "source", None)
    if inner is not None:  # a variant of another image
        return replace(source, source=read_as(inner, reading))  # type: ignore[type-var]
    return replace(source, reading=reading) if hasattr(source, "reading") else source  # type: ignore[type-var]


def stamps_of(sources: Sequence[ImageSource], *, skip: bool = False) -> tuple[list[str], str]:
    """Return a stamp of every image, and what the stamps follow: ``content``, or ``size and time``.

    Images of at most :data:`HASHED_BYTES` together are read and hashed. For more, a file that is exchanged for another
    of the same size and time is not noticed.

    Args:
        sources: The images.
        skip: Give unreadable images the stamp ``unreadable`` instead of raising.

    Raises:
        DataError: An image cannot be read.
    """

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except DataError:
            if not skip:
                raise
            return otherwise

    total = 0
    for source in sources:
        total += tried(source.stored_bytes, 0)
        if total > HASHED_BYTES:
            return [tried(source.stamp, "unreadable") for source in sources], "size and time"
    return [tried(source.content, "unreadable") for source in sources], "content"


def contents_of(sources: Sequence[ImageSource]) -> list[str | None] | None:
    """Return the SHA-256 of the stored bytes of every image, whatever its reading; None for an unreadable image.

    The list itself is None if the images have more than :data:`HASHED_BYTES` together.
    """
    stamps, follow = stamps_of([read_as(source, PLAIN) for source in sources], skip=True)
    return [None if stamp == "unreadable" else stamp for stamp in stamps] if follow == "content" else None


def stamps_record(followed: str) -> dict[str, str]:
    """Return the part of a feature key that says what stamps follow; empty for sizes and times, as in older keys."""
    return {"stamps": followed} if followed == "content" else {}


@dataclass(frozen=True)
class FileSource:
    """An image file on disk."""

    path: str
    reading: Reading = PLAIN

    def open(self) -> Image:
        """Decode the file. Raises :class:`~vlprompt.errors.DataError` that names it."""
        return decode_rgb(*self.encoded(), self.reading)

    def stamp(self) -> str:
        """Return size and modification time."""
        status = self._status()
        return self.reading.stamped(f"{status.st_size}-{status.st_mtime_ns}")

    def stored_bytes(self) -> int:
        """Return the size of the file."""
        return self._status().st_size

    def content(self) -> str:
        """Return the SHA-256 of the file."""
        return self.reading.stamped(sha256_bytes(self.encoded()[0]))

    def encoded(self) -> tuple[bytes, str]:
        """Return the bytes of the file and its name."""
        try:
            return read_bytes(self.path, MAX_BYTES), self.path
        except OSError as error:
            raise DataError(f"Image {self.path} cannot be read: {error.strerror or error}.") from error

    def _status(self) -> os.stat_result:
        try:
            return os.stat(self.path)
        except OSError as error:
            raise DataError(f"Image {self.path} cannot be read: {error.strerror or error}.") from error


@dataclass(frozen=True)
class ZipSource:
    """An image inside a zip archive."""

    archive: str
    member: str
    reading: Reading = PLAIN

    def open(self) -> Image:
        """Decode the member. Raises :class:`~vlprompt.errors.DataError` that names it."""
        return decode_rgb(*self.encoded(), self.reading)

    def encoded(self) -> tuple[bytes, str]:
        """Return the bytes of the member and its name."""
        name = f"{self.archive}:{self.member}"
        try:
            archive = _archive(self.archive, os.getpid())
            info = archive.getinfo(self.member)
            if info.file_size > MAX_BYTES:  # zipfile reads no more than this size
                raise ValueError(f"it has {info.file_size:,} bytes; at most {MAX_BYTES:,} are read")
            return archive.read(info), name
        except ZIP_ERRORS as error:
            raise DataError(f"Image {name} cannot be read: {error}.") from error

    def stamp(self) -> str:
        """Return size and checksum from the archive's table of contents."""
        info = self._info()
        return self.reading.stamped(f"{info.file_size}-{info.CRC:08x}")

    def stored_bytes(self) -> int:
        """Return 0: the archive's table of contents has a checksum of every member."""
        return 0

    def content(self) -> str:
        """Return :meth:`stamp`, which follows the content."""
        return self.stamp()

    def _info(self) -> zipfile.ZipInfo:
        try:
            return _archive(self.archive, os.getpid()).getinfo(self.member)
        except ZIP_ERRORS as error:
            raise DataError(f"Image {self.archive}:{self.member} cannot be read: {error}.") from error


@functools.lru_cache(maxsize=16)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # Keyed by process: a forked worker shares the file position of an archive opened before the fork.
    return zipfile.ZipFile(open_regular(path))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; real problems raise below
        yield


def decode_rgb(data: bytes, name: str, reading: Reading = PLAIN) -> Image:
    """Decode image bytes to 8-bit RGB.

    The conversion precedes every other operation, as in Dassl: a palette or RGBA image that is resized before
    conversion has different pixels.

    Args:
        data: The content of the file.
        name: Name of the image in error messages.
        reading: How orientation tags and transparency are read; by default as in all published protocols.

    Returns:
        A loaded PIL image of mode ``RGB``.

    Raises:
        DataError: If the bytes are not an image of a known format, are truncated, or have more than ``MAX_PIXELS``
            pixels or more than 8 bits per channel. The text gives name, size and first bytes.
    """
    with _opened(data, name) as image:
        mode = image.mode
        converted = _converted(image, reading)
    if mode.startswith(("I", "F")):
        raise DataError(
            f"Image {name} has more than 8 bits per channel (Pillow mode {mode}). Converting it would clip "
            "the brightness silently: scale it to 8 bits per channel first."
        )
    return converted


def tag_and_alpha(source: ImageSource) -> tuple[bool, bool]:
    """Return whether an image has an orientation tag that turns or mirrors it, and whether pixels are transparent.

    Images that are not encoded files have neither.

    Raises:
        DataError: As ``source.open()``.
    """
    inner = getattr(source, "source", source)
    if not hasattr(inner, "encoded"):
        return False, False
    with _opened(*inner.encoded()) as image:
        alpha = image.convert("RGBA").getchannel("A") if _has_alpha(image) else None
        transparent = alpha is not None and alpha.histogram()[255] < alpha.width * alpha.height
        if image.format == "TIFF":
            image.load()  # Pillow turns it then, and removes the tag
        return _turn(image) is not None, transparent


def _converted(image: Image, reading: Reading) -> Image:
    turn = None
    if reading.orientation == "tag":
        image.load()  # Pillow turns TIFF while it loads, and then removes the tag
        turn = _turn(image)
    if reading.background is not None and _has_alpha(image):
        from PIL import Image

        behind = Image.new("RGBA", image.size, reading.background)
        rgb = Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _has_alpha(image: Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _turn(image: Image) -> Any:
    """Return the transposition that the orientation tag asks for, or ``None``; a damaged tag is none."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        tag = image.getexif().get(0x0112)
        return turns.get(tag) if isinstance(tag, int) else None
    except Exception:  # metadata of a damaged file raise many types
        return None


@functools.lru_cache(maxsize=1)
def _decoders() -> tuple[str, ...]:
    """Return the accepted formats that this Pillow, with its HEIF plugin if that is installed, can decode."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image]:
    """Open an image and turn every error of Pillow in the context into a DataError."""
    from PIL import Image

    described = f"{len(data):,} bytes, beginning {data[:8].hex(' ') or '(nothing)'}"
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=_decoders())
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"Image {name} is too large to decode safely ({error}; at most {MAX_PIXELS:,} pixels are accepted). "
            "Scale it down first."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on a damaged file
        missing = _BRANDS.get(data[8:12], "") if data[4:8] == b"ftyp" else ""
        advice = f"{missing}; or convert the file" if missing else "Replace or remove the file"
        raise DataError(
            f"Image {name} cannot be decoded ({described}): {_first_line(error)}. {advice}; accepted "
            f"formats: {', '.join(FORMATS)}."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = (text[0] if text else type(error).__name__).rstrip(".")
    return "unknown image format" if first.startswith("cannot identify") else first[:200]


def is_image(name: str) -> bool:
    """Return whether a file name has an image suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)
