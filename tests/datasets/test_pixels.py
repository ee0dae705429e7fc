"""Pixels as the user sees them: orientation tags, transparency, and stamps that follow the content."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.datasets.archives import tar_of, zip_of
from vlprompt.datasets import FileSource, ZipSource, decode_rgb, images, load_dataset
from vlprompt.datasets.acquire.check import check
from vlprompt.datasets.catalogue import find_card
from vlprompt.datasets.images import AS_SEEN, PLAIN, ImageSource, Reading, read_as, stamps_of, tag_and_alpha
from vlprompt.datasets.readers.tar_files import ShardSource
from vlprompt.datasets.variants import VariantSource
from vlprompt.errors import ConfigError

UPRIGHT = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
#: By orientation tag, the stored pixels of an image that viewers show as ``UPRIGHT`` (EXIF 2.3, tag 0x0112).
STORED = {
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT, 2).transpose(1, 0, 2), 8: np.rot90(UPRIGHT, -1),
}  # fmt: skip


def tagged(tag: int, form: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(STORED.get(tag, UPRIGHT))).save(stream, form, exif=exif, lossless=True)
    return stream.getvalue()


def see_through(mode: str = "RGBA") -> bytes:
    """Return a PNG: left half opaque red, right half transparent black."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    stream = io.BytesIO()
    image.convert(mode).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("tag", STORED)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_every_orientation_is_followed_on_request_and_else_ignored(tag: int, form: str) -> None:
    data = tagged(tag, form)
    assert np.array_equal(np.asarray(decode_rgb(data, "x", AS_SEEN)), UPRIGHT)
    assert np.array_equal(np.asarray(decode_rgb(data, "x")), STORED[tag])


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_unknown_orientations_are_none(tag: int) -> None:
    assert np.array_equal(np.asarray(decode_rgb(tagged(tag), "x", AS_SEEN)), UPRIGHT)


@given(st.binary(max_size=60))
def test_a_damaged_tag_never_stops_an_image(exif: bytes) -> None:
    stream = io.BytesIO()
    Image.fromarray(UPRIGHT).save(stream, "PNG", exif=b"Exif\0\0" + exif)
    assert decode_rgb(stream.getvalue(), "x", AS_SEEN).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("background", "behind"), [("#ffffff", 255), ("#000000", 0), (None, 0), ("#102030", None)])
def test_transparent_pixels_have_the_background(mode: str, background: str | None, behind: int | None) -> None:
    pixels = np.asarray(decode_rgb(see_through(mode), "x", Reading("ignore", background)))
    assert pixels[0, -1].tolist() == ([behind] * 3 if behind is not None else [16, 32, 48])
    assert pixels[0, 0].tolist() == np.asarray(decode_rgb(see_through(mode), "x"))[0, 0].tolist()


def sources(folder: Path, data: bytes) -> dict[str, ImageSource]:
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(data)
    (folder / "x.zip").write_bytes(zip_of({"x.png": data}))
    (folder / "x.tar").write_bytes(tar_of({"x.png": data}, "w"))
    return {
        "file": FileSource(str(folder / "x.png")),
        "zip": ZipSource(str(folder / "x.zip"), "x.png"),
        "shard": ShardSource(str(folder / "x.tar"), 512, len(data), "x"),
        "variant": VariantSource(FileSource(str(folder / "x.png")), "blur", "x"),
    }


@pytest.mark.parametrize("kind", ["file", "zip", "shard", "variant"])
def test_every_source_has_readings_that_its_stamp_and_content_name(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path, tagged(6))[kind]
    assert read_as(source, PLAIN) == source and source.open().size == (6, 4)
    seen = read_as(source, AS_SEEN)
    assert seen.open().size == (4, 6)
    assert len({one for s in (source, seen) for one in (s.stamp(), s.content())}) == (2 if kind == "zip" else 4)
    assert tag_and_alpha(source) == (True, False)


@pytest.mark.parametrize("kind", ["file", "zip", "shard", "variant"])
def test_contents_are_told_apart_where_size_and_time_are_equal(kind: str, tmp_path: Path) -> None:
    contents = []
    for data in (b"one", b"two"):
        source = sources(tmp_path, data)[kind]
        for path in tmp_path.iterdir():
            os.utime(path, ns=(0, 0))
        images._archive.cache_clear()
        (content,), follows = stamps_of([source])
        assert follows == "content"
        contents.append(content)
    assert contents[0] != contents[1]


def test_large_sets_have_stamps_of_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources(tmp_path, tagged(1))["file"]
    monkeypatch.setattr(images, "HASHED_BYTES", source.stored_bytes())
    assert stamps_of([source]) == ([source.content()], "content")
    assert stamps_of([source] * 2) == ([source.stamp()] * 2, "size and time")
    gone = FileSource(str(tmp_path / "gone.png"))
    assert stamps_of([source, gone], skip=True) == ([source.content(), "unreadable"], "content")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name, data in (("cat", tagged(6)), ("dog", see_through())):
        for number in range(4):
            path = tmp_path / "own" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("given_values", "size", "colour"),
    [
        ({}, (4, 6), [255, 255, 255]),
        ({"orientation": "ignore"}, (6, 4), [255, 255, 255]),
        ({"background": "none"}, (4, 6), [0, 0, 0]),
        ({"orientation": "tag", "background": "#0000ff"}, (4, 6), [0, 0, 255]),
    ],
)
def test_own_images_are_read_as_seen_and_the_record_says_so(
    given_values: dict[str, Any], size: tuple[int, int], colour: list[int], own: Path
) -> None:
    task = load_dataset("folder", root=own, shots=-1, **given_values)
    opened = {sample.label: sample.source.open() for sample in task.train}
    assert opened[0].size == size and np.asarray(opened[1])[0, -1].tolist() == colour
    assert task.describe()["pixels"]["orientation"] == given_values.get("orientation", "tag")


def test_check_counts_both(own: Path) -> None:
    facts = check(find_card("folder"), own).facts
    assert facts["pixels"] == {"turned": 4, "transparent": 4, "orientation": "tag", "background": "#ffffff"}


def test_published_sets_keep_the_plain_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_dataset("demo", shots=1)
    assert task.describe()["pixels"] == {"orientation": "ignore", "background": None}
    seen = load_dataset("demo", shots=1, orientation="tag")
    assert seen.train[0].source.stamp() != task.train[0].source.stamp()


def test_arrays_have_neither_and_say_so(monkeypatch: pytest.MonkeyPatch, paint: Callable[..., Path]) -> None:
    from vlprompt.datasets import task as tasks
    from vlprompt.datasets.records import Sample, SplitLists

    class Drawn:
        def open(self) -> Image.Image:
            return Image.new("RGB", (8, 8))

        def stamp(self) -> str:
            return "drawn"

        def stored_bytes(self) -> int:
            return 0

        def content(self) -> str:
            return "drawn"

    source = Drawn()
    lists = SplitLists(["a", "b"], [Sample("x", 0, source), Sample("y", 1, source)], [], [Sample("z", 0, source)])
    monkeypatch.setattr(tasks, "read_dataset", lambda card, root: lists)
    with pytest.raises(ConfigError, match="stored as arrays"):
        load_dataset("demo", orientation="tag")


@pytest.mark.parametrize(
    "values",
    [{"orientation": "up"}, {"orientation": True}, {"background": "blue"}, {"background": "#FFF"}, {"background": 3}],
)
def test_other_readings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(values))} is .*accepted"):
        load_dataset("demo", shots=1, **values)
