"""Banks of generated images on disk, addressed by the content of the source image.

    BANK/<recipe id, 16 digits>/recipe.json                the recipe (:mod:`vlprompt.generation.recipe`)
    BANK/<recipe id>/<2 digits>/<SHA-256>/pictures.json    SHA-256 of every generated image of a source image
    BANK/<recipe id>/<2 digits>/<SHA-256>/000.png, ...     the generated images

An image is written atomically, then recorded; an image without a record, or different from it, counts as missing.
Several processes may read and fill a bank at once.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlprompt._files import (
    file_checksum,
    home_path,
    leftovers,
    locked,
    parse_json,
    read_bytes,
    read_text,
    sha256_bytes,
    sha256_text,
    write_bytes,
    write_json,
    write_text,
)
from vlprompt.datasets.images import MAX_BYTES, PLAIN, FileSource, ImageSource, decode_rgb, tag_and_alpha
from vlprompt.errors import ConfigError, DataError, bulleted
from vlprompt.generation.recipe import TOOL, Format, Recipe, read_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE, RECORD = "recipe.json", "pictures.json"
_LARGEST_RECORD = 2**24
_ENCODERS: Mapping[Format, Mapping[str, object]] = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "quality": 50},
    "jpeg": {"quality": 75},
}


def content_sha256(source: ImageSource) -> str:
    """Return the SHA-256 of an image file, or of the decoded pixels of an image that is not a file.

    Raises:
        DataError: If it cannot be read.
    """
    if isinstance(source, FileSource):
        try:
            digest = file_checksum(source.path)
        except OSError as error:
            raise DataError(f"Image {source.path} cannot be read: {error.strerror or error}.") from error
        # Pictures are made of the pixels as they are read.
        differs = source.reading != PLAIN and any(tag_and_alpha(source))
        return sha256_text(source.reading.stamped(digest)) if differs else digest
    image = source.open()
    return sha256_bytes(f"RGB {image.width} {image.height}\n".encode() + image.tobytes())


class DiffusionBank:
    """The generated images of a recipe.

    Attributes:
        folder: Folder of the images.
        recipe: The recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    @property
    def recipe_id(self) -> str:
        """Hash of the recipe: everything that a generated image depends on besides its source and number."""
        return self.recipe.id

    def images(self, source: ImageSource, count: int) -> list[Image]:
        """Return the first ``count`` generated images of a source image, PIL RGB.

        Raises:
            DataError: If the source image cannot be read, or generated images are missing or damaged; the text has the
                command that generates them.
        """
        digest = content_sha256(source)
        record = self.record(digest)
        missing = [number for number in range(count) if number not in record]
        if missing:
            raise DataError(
                f"The bank {self.folder} has {count - len(missing)} of the {count} generated images of "
                f"{_name(source, digest)}. Generate the others: {self._command(count)}"
            )
        images = []
        for number in range(count):
            data = self._valid(digest, number, record)
            path = self.path(digest, number)
            if data is None:
                raise DataError(
                    f"Generated image {path} is damaged or missing. Generate it again: {self._command(count)}"
                )
            images.append(decode_rgb(data, str(path)))
        return images

    def missing(self, source: str, count: int) -> tuple[list[int], list[int]]:
        """Return the numbers below ``count`` of the images to generate, and those of them that are recorded.

        Args:
            source: SHA-256 of the source image.
            count: Number of generated images.
        """
        record = self.record(source)
        missing = [number for number in range(count) if self._valid(source, number, record) is None]
        return missing, [number for number in missing if number in record]

    def path(self, source: str, number: int) -> Path:
        """Return the file of generated image ``number`` of the source image with this SHA-256."""
        return self._home(source) / f"{number:03d}.{self.recipe.format}"

    def record(self, source: str) -> dict[int, str]:
        """Return the SHA-256 of every generated image of a source image by number; empty if the record is damaged."""
        try:
            content = parse_json(read_text(self._home(source) / RECORD, _LARGEST_RECORD))
            return {int(number): str(digest) for number, digest in content["pictures"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def store(self, source: str, name: str, images: Mapping[int, Image]) -> None:
        """Write generated images of a source image and record them.

        Args:
            source: SHA-256 of the source image.
            name: Name of the source image in the record, for people.
            images: Generated images by number.

        Raises:
            DataError: If the bank cannot be written.
        """
        home = self._home(source)
        try:
            home.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".lock"):
                for stale in leftovers(home):  # the lock is held: a killed process left them
                    stale.unlink(missing_ok=True)
                record = self.record(source)
                for number, image in images.items():
                    data = encoded(image, self.recipe.format)
                    write_bytes(self.path(source, number), data)
                    record[number] = sha256_bytes(data)
                write_json(home / RECORD, {"image": source, "name": name, "pictures": dict(sorted(record.items()))})
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _home(self, source: str) -> Path:
        return self.folder / source[:2] / source

    def _valid(self, source: str, number: int, record: Mapping[int, str]) -> bytes | None:
        """Return the bytes of an image that matches its record, else None."""
        if number not in record:
            return None
        try:
            data = read_bytes(self.path(source, number), MAX_BYTES)
        except OSError:
            return None
        return data if sha256_bytes(data) == record[number] else None

    def _command(self, count: int) -> str:
        # The options are not part of the id, so that others may have changed them: nothing of them is run by a shell.
        options = shlex.split(self.recipe.about.get("options", ""))
        words = ["--bank", str(self.folder.parent), "--count", str(count), *options]
        return f"{TOOL} {shlex.join(words)} --data.name NAME"


def open_bank(path: Path) -> DiffusionBank:
    """Return the bank at ``path``: the folder passed to the tool, or the folder of a recipe in it.

    Raises:
        ConfigError: If there is no bank, or there are several recipes.
        DataError: If the recipe is damaged.
    """
    folders = [path] if (path / RECIPE).is_file() else sorted(file.parent for file in path.glob(f"*/{RECIPE}"))
    if not folders:
        problem = "has no generated images" if path.is_dir() else "is not a folder"
        raise ConfigError(f"data.bank {str(path)!r} {problem}. Generate them: {TOOL} --bank {path} --data.name NAME")
    banks = [DiffusionBank(folder, _read(folder)) for folder in folders]
    if len(banks) > 1:
        lines = (f"{bank.folder}: {bank.recipe.about.get('options', '')}" for bank in banks)
        raise ConfigError(f"data.bank {str(path)!r} has images of several recipes. Give one of:\n{bulleted(lines)}")
    return banks[0]


def create_bank(root: Path, recipe: Recipe) -> DiffusionBank:
    """Return the bank of a recipe in ``root``; creates it if it does not exist.

    Raises:
        DataError: If it cannot be written, or its recipe is damaged.
    """
    folder = home_path(root) / recipe.id[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not (folder / RECIPE).is_file():
                write_text(folder / RECIPE, recipe.text())
    except OSError as error:
        raise _unwritable(root, error) from error
    stored = _read(folder)
    if stored.id != recipe.id:
        raise DataError(f"{folder / RECIPE} is another recipe with the same prefix. Give another folder: --bank FOLDER")
    return DiffusionBank(folder, stored)


def encoded(image: Image, kind: Format) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, format=kind.upper(), **_ENCODERS[kind])
    return stream.getvalue()


def _read(folder: Path) -> Recipe:
    try:
        return read_recipe(read_text(folder / RECIPE, _LARGEST_RECORD), str(folder / RECIPE))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / RECIPE} cannot be read: {error}.") from error


def _name(source: ImageSource, digest: str) -> str:
    return f"{getattr(source, 'path', 'an image')} (SHA-256 {digest[:16]}...)"


def _unwritable(folder: Path, error: OSError) -> DataError:
    why = error.strerror or str(error)
    return DataError(f"Generated images cannot be written to {folder}: {why}. Give another folder: --bank FOLDER")
