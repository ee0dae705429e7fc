"""Images, words of the command line and environment variables that are not as expected, through whole commands."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fixtures import malformed
from tests.fixtures.malformed import CONTROLS, assert_refused, everything_in, remove
from tests.fixtures.valid_files import command, picture, place, zip_of
from vlprompt.cli.main import COMMANDS

__all__ = ["place"]


# -- images -----------------------------------------------------------------------------------------------------------
def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("L" if mode == "I;16" else "RGB", (40, 30), 90).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int) -> bytes:
    """Return a PNG file that states this size and has hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM"}
REFUSED_IMAGES: dict[str, bytes] = {
    **{f"half.{ending}": (data := encoded(kind))[: len(data) // 2] for ending, kind in FORMATS.items()},
    **{f"header.{ending}": encoded(kind)[:12] for ending, kind in FORMATS.items()},
    "sixteen.png": encoded("PNG", "I;16"),
    "empty.png": b"",
    "zeros.jpg": bytes(500),
    "wide.png": png(2**31 - 1, 1),
    "huge.png": png(60_000, 60_000),
    "nothing.png": png(0, 0),
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "print.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "text.png": b"no pixels",
    "page.jpg": b"<!DOCTYPE html><html></html>",
    "paper.png": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "archive.png": zip_of({"a.png": picture(1)}),
    "film.png": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100),
}
ACCEPTED_IMAGES: dict[str, bytes] = {
    "grey.png": encoded("PNG", "L"),
    "palette.png": encoded("PNG", "P"),
    "one bit.png": encoded("PNG", "1"),
    "transparent.png": encoded("PNG", "RGBA"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "animated.gif": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "two pages.tif": encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "really png.jpg": encoded("PNG"),
    "no ending": encoded("PNG"),
    "UPPER.PNG": encoded("PNG"),
    "trailing.png": encoded("PNG") + b"more",
    "caf\u00e9 \u4e2d.png": encoded("PNG"),
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
@pytest.mark.parametrize("words", [[], ["--workers", "2"]], ids=["alone", "threads"])
def test_an_image_that_cannot_be_decoded_is_refused(name: str, words: list[str], place: tuple[Path, Path]) -> None:
    path = place[0] / name
    path.write_bytes(REFUSED_IMAGES[name])
    before = everything_in(place[0])
    result = command(["predict", "again", *words, "pics/apple/0.png", name])
    assert everything_in(place[0]) == before and not result.out
    path.unlink()
    assert_refused(result, (name,))


@pytest.mark.parametrize("name", ACCEPTED_IMAGES)
def test_an_unusual_image_is_predicted(name: str, place: tuple[Path, Path]) -> None:
    path = place[0] / name
    path.write_bytes(ACCEPTED_IMAGES[name])
    status, out, err = command(["predict", "again", name])
    path.unlink()
    assert status == 0 and name in out and not err


@pytest.mark.parametrize("name", malformed.PLACES)
def test_what_is_no_file_is_not_predicted(name: str, place: tuple[Path, Path]) -> None:
    path = place[0] / "odd.png"
    malformed.PLACES[name](path, b"")
    result = command(["predict", "again", "odd.png"])
    remove(path)
    assert_refused(result, ("odd.png",))


def test_names_of_files_that_are_no_text_are_shown_escaped(place: tuple[Path, Path]) -> None:
    path = place[0] / os.fsdecode(b"caf\xe9\x1b[2J.png")
    path.write_bytes(encoded("PNG"))
    status, out, err = command(["predict", "again", str(path)])
    path.unlink()
    assert status == 0 and "caf\\udce9\\x1b[2J.png" in out and not CONTROLS.search(out + err)


# -- words of the command line ----------------------------------------------------------------------------------------
WORDS: dict[str, list[str]] = {
    "an unknown option": ["--colour\x1b[2J", "red"],
    "an option without a value": ["--config"],
    "an option twice": ["--seed", "1", "--seed", "2"],
    "dashes": ["--"],
    "one dash": ["-x"],
    "an empty word": [""],
    "no text": [os.fsdecode(b"\xff\xfe")],
    "a word without end": ["x" * 100_000],
    "an option without end": ["--" + "x" * 100_000, "1"],
    "two hundred options": [word for number in range(200) for word in (f"--option{number}", "1")],
    "braces": ["--data", "{name: {a: [1"],
    "a reference": ["--data.name", "!!python/object/apply:os.system [ls]"],
    "controls": ["\x1b]0;title\x07\u202e"],
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_odd_words_are_refused_by_every_command(name: str, words: str, place: tuple[Path, Path]) -> None:
    before = everything_in(place[0])
    result = command([name, *WORDS[words]])
    assert everything_in(place[0]) == before and not result.out
    assert_refused(result, ("command line", "there is no `vlprompt", "no data set matches", "'list "))


GRIDS = (
    *(
        "",
        "=",
        "recipe.lr",
        "recipe.lr=",
        "=0.1",
        "recipe.lr=,",
        "recipe.lr=a,b",
        "recipe.lr=0.1,0.1",
        "recipe.lr=[0.1",
        ".=",
    ),
    *(
        "recipe.lr=.nan,1",
        "recipe.lr=-1,1",
        "recipe.epochs=0,1",
        "recipe.epochs=1.5,2",
        f"recipe.epochs={10**30},1",
        "seed=1,2",
    ),
    *(
        "settings.context_length=0,1",
        "settings.colour=1,2",
        "data.name=a,b",
        "recipe.lr=\x1b[2J,1",
        f"recipe.lr={'1,' * 2000}2",
    ),
    *("settings.context_length={a: 1},2", f"settings.{'x' * 10_000}=1,2"),
)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: ascii(grid[:30])[1:-1])
def test_a_grid_that_cannot_be_searched_is_refused(grid: str, place: tuple[Path, Path]) -> None:
    before = everything_in(place[0])
    result = command(["search", "--config", "recipe.yaml", "--grid", grid])
    assert everything_in(place[0]) == before and not result.out
    assert_refused(result, ("--grid", "grid cannot be searched"))


@pytest.mark.parametrize("form", malformed.BYTES)
def test_damaged_features_are_listed_as_damaged(form: str, place: tuple[Path, Path]) -> None:
    path = min((place[0] / "cache/features").glob("*.safetensors"))
    valid, before = path.read_bytes(), command(["cache", "list"])
    path.write_bytes(malformed.BYTES[form](valid))
    status, out, err = command(["cache", "list"])
    path.write_bytes(valid)
    assert status == 0 and out.count("damaged") == before.out.count("damaged") + 1
    assert not CONTROLS.search(out + err)


PLACES_OF: dict[str, list[str]] = {
    "VLPROMPT_DATA": ["data", "shots", "own-lines"],
    "VLPROMPT_CARDS": ["data", "shots", "own-lines"],
    "VLPROMPT_CACHE": ["eval", "RUN"],
}


@pytest.mark.parametrize("value", ["recipe.yaml", "nowhere", "/dev/null", "x" * 5000, os.fsdecode(b"caf\xe9")])
@pytest.mark.parametrize("name", PLACES_OF)
def test_a_variable_that_names_no_folder(
    name: str, value: str, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    result = command([word.replace("RUN", str(place[1])) for word in PLACES_OF[name]])
    if name == "VLPROMPT_CACHE" and value in ("nowhere", os.fsdecode(b"caf\xe9")):
        assert result.status == 0  # it is made
        shutil.rmtree(value)
    else:
        assert_refused(result, (name, "Unknown data set", "is not there", "cannot be written", "File name too long"))
