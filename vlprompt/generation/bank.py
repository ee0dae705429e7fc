"""Generated pictures on disk, found by the content of the image that they were made of.

    BANK/<recipe id, 16 digits>/recipe.json                the recipe (:mod:`vlprompt.generation.recipe`)
    BANK/<recipe id>/<2 digits>/<SHA-256>/pictures.json    the SHA-256 of every finished picture of an image
    BANK/<recipe id>/<2 digits>/<SHA-256>/000.png, ...     the pictures

A picture is written to a temporary name and renamed, then recorded; what is not recorded, or differs from its record,
is not there. Several processes may read and fill a bank at once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from vlprompt._files import file_checksum, leftovers, sha256_bytes, write_bytes, write_json, write_text
from vlprompt.datasets.images import FileSource, ImageSource, decode_rgb
from vlprompt.errors import ConfigError, DataError, bulleted
from vlprompt.generation.recipe import TOOL, Format, Recipe, read_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE, RECORD = "recipe.json", "pictures.json"
_ENCODERS: Mapping[Format, Mapping[str, object]] = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "quality": 50},
    "jpeg": {"quality": 75},
}


def content_sha256(source: ImageSource) -> str:
    """Return the SHA-256 of an image's file, or, where it has none of its own, of its decoded pixels.

    Raises:
        DataError: It cannot be read.
    """
    if isinstance(source, FileSource):
        try:
            return file_checksum(source.path)
        except OSError as error:
            raise DataError(f"Image {source.path} cannot be read: {error.strerror or error}.") from error
    picture = source.open()
    return sha256_bytes(f"RGB {picture.width} {picture.height}\n".encode() + picture.tobytes())


class DiffusionBank:
    """The pictures that one recipe made.

    Attributes:
        folder: Where they are.
        recipe: How they were made.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    @property
    def recipe_id(self) -> str:
        """Hash of the recipe: with the source image, all that a picture depends on."""
        return self.recipe.id

    def images(self, source: ImageSource, count: int) -> list[Image]:
        """Return the first ``count`` pictures of an image, PIL RGB.

        Raises:
            DataError: The image cannot be read; there are fewer pictures, or one is damaged; the text says how to
                make them.
        """
        image = content_sha256(source)
        record = self.record(image)
        lacking = [number for number in range(count) if number not in record]
        if lacking:
            raise DataError(
                f"The bank {self.folder} has {count - len(lacking)} of the {count} pictures of {_name(source, image)}. "
                f"Make the others: {self._command(count)}"
            )
        found = []
        for number in range(count):
            data = self._sound(image, number, record)
            if data is None:
                raise DataError(
                    f"Picture {self.path(image, number)} is damaged or gone. Make it again: {self._command(count)}"
                )
            found.append(decode_rgb(data, str(self.path(image, number))))
        return found

    def missing(self, image: str, count: int) -> tuple[list[int], list[int]]:
        """Return the numbers below ``count`` of the pictures to make, and those of them that were there once.

        Args:
            image: SHA-256 of the source image.
            count: Pictures wanted.
        """
        record = self.record(image)
        lacking = [number for number in range(count) if self._sound(image, number, record) is None]
        return lacking, [number for number in lacking if number in record]

    def path(self, image: str, number: int) -> Path:
        """Return the file of picture ``number`` of the image with this SHA-256."""
        return self._home(image) / f"{number:03d}.{self.recipe.format}"

    def record(self, image: str) -> dict[int, str]:
        """Return the SHA-256 of every finished picture of an image by number; none where the record is damaged."""
        try:
            found = json.loads((self._home(image) / RECORD).read_text(encoding="utf-8"))
            return {int(number): str(digest) for number, digest in found["pictures"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def keep(self, image: str, name: str, pictures: Mapping[int, Image]) -> None:
        """Write pictures of an image and record them.

        Args:
            image: SHA-256 of the source image.
            name: What to call it in the record, for people.
            pictures: By number.

        Raises:
            DataError: The bank cannot be written.
        """
        home = self._home(image)
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                for stale in leftovers(home):  # the lock is held: a killed process left them
                    stale.unlink(missing_ok=True)
                record = self.record(image)
                for number, picture in pictures.items():
                    data = encoded(picture, self.recipe.format)
                    write_bytes(self.path(image, number), data)
                    record[number] = sha256_bytes(data)
                write_json(home / RECORD, {"image": image, "name": name, "pictures": dict(sorted(record.items()))})
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _home(self, image: str) -> Path:
        return self.folder / image[:2] / image

    def _sound(self, image: str, number: int, record: Mapping[int, str]) -> bytes | None:
        """Return the bytes of a picture that is as it was recorded."""
        if number not in record:
            return None
        try:
            data = self.path(image, number).read_bytes()
        except OSError:
            return None
        return data if sha256_bytes(data) == record[number] else None

    def _command(self, count: int) -> str:
        given = self.recipe.about.get("options", "")
        return f"{TOOL} --bank {self.folder.parent} --count {count}{given and ' '}{given} --data.name NAME"


def open_bank(path: Path) -> DiffusionBank:
    """Return the bank at ``path``: the folder that the tool was given, or one of the recipes' folders in it.

    Raises:
        ConfigError: There is none, or there are several recipes to choose from.
        DataError: Its recipe is damaged.
    """
    folders = [path] if (path / RECIPE).is_file() else sorted(found.parent for found in path.glob(f"*/{RECIPE}"))
    if not folders:
        what = "holds no generated pictures" if path.is_dir() else "is no folder"
        raise ConfigError(f"data.bank {str(path)!r} {what}. Make them: {TOOL} --bank {path} --data.name NAME")
    banks = [DiffusionBank(folder, _read(folder)) for folder in folders]
    if len(banks) > 1:
        lines = (f"{bank.folder}: {bank.recipe.about.get('options', '')}" for bank in banks)
        raise ConfigError(f"data.bank {str(path)!r} has pictures of several recipes. Give one of:\n{bulleted(lines)}")
    return banks[0]


def make_bank(root: Path, recipe: Recipe) -> DiffusionBank:
    """Return the bank of a recipe in ``root``, which is begun if it is not there.

    Raises:
        DataError: It cannot be written, or its recipe is damaged.
    """
    folder = root.expanduser() / recipe.id[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (folder / RECIPE).is_file():
                write_text(folder / RECIPE, recipe.text())
    except OSError as error:
        raise _unwritable(root, error) from error
    kept = _read(folder)
    if kept.id != recipe.id:
        raise DataError(
            f"{folder / RECIPE} is another recipe of the same beginning. Give another folder: --bank FOLDER"
        )
    return DiffusionBank(folder, kept)


def encoded(picture: Image, kind: Format) -> bytes:
    """Return a picture as the bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, format=kind.upper(), **_ENCODERS[kind])
    return stream.getvalue()


def _read(folder: Path) -> Recipe:
    try:
        return read_recipe((folder / RECIPE).read_text(encoding="utf-8"), str(folder / RECIPE))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / RECIPE} cannot be read: {error}.") from error


def _name(source: ImageSource, image: str) -> str:
    return f"{getattr(source, 'path', 'an image')} (SHA-256 {image[:16]}...)"


def _unwritable(folder: Path, error: OSError) -> DataError:
    why = error.strerror or str(error)
    return DataError(f"Generated pictures cannot be written to {folder}: {why}. Give another folder: --bank FOLDER")
