"""Image-caption pairs from files of the user: lists, folders and shards, all untrusted."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlprompt
from tests.datasets.archives import tar_of
from tests.datasets.layouts import encoded
from vlprompt.errors import ConfigError, DataError
from vlprompt.pairs import Pair, load_pairs
from vlprompt.pairs.shards import find_shards

PNG, JPG = encoded(".png"), encoded(".jpg")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "shards"


def write(folder: Path, **files: str | bytes) -> Path:
    """Write files; in names, ``__`` stands for a dot and ``_in_`` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(pairs: list[Pair]) -> list[tuple[str, str]]:
    assert all(pair.source.open().size == (12, 10) and pair.domain == "" for pair in pairs)
    return [(pair.id, pair.caption) for pair in pairs]


def refused(source: str | Path, *matches: str, **named: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_pairs(source, **named)
    text = str(caught.value)
    assert all(match in text for match in matches), text
    return text


# -- lists ------------------------------------------------------------------------------------------------------------
AS_LISTS = {
    "p.jsonl": '{"image": "a.png", "caption": "an a", "more": [1]}\n\n'
    '{"caption": " b, or so ", "image": "sub/b.jpg"}\r\n{"image": "a.png", "caption": "a again"}',
    "p.csv": 'id,Image,CAPTION\n1,a.png,an a\n\n2,sub/b.jpg,"b, or so"\r\n3,a.png,a again\n',
    "p.CSV": "\ufefffilepath\ttitle\na.png\tan a\nsub/b.jpg\tb, or so\na.png\ta again\n",
    "p.tsv": "text\tfile_name\nan a\ta.png\nb, or so\tsub/b.jpg\na again\ta.png",
}


@pytest.mark.parametrize("name", AS_LISTS)
def test_lists(name: str, tmp_path: Path) -> None:
    write(tmp_path, a__png=PNG, sub_in_b__jpg=JPG)
    (tmp_path / name).write_text(AS_LISTS[name], encoding="utf-8", newline="")
    pairs = load_pairs(str(tmp_path / name))
    assert captions(pairs) == [("a.png", "an a"), ("sub/b.jpg", "b, or so"), ("a.png", "a again")]
    assert pairs[0].source == pairs[2].source and vlprompt.load_pairs(tmp_path / name) == pairs


def test_images_under_another_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, images_in_a__png=PNG, lists_in_p__csv="image,caption\na.png,an a\n")
    monkeypatch.chdir(tmp_path / "lists")
    assert captions(load_pairs("p.csv", root="../images")) == [("a.png", "an a")]
    refused("p.csv", "1 of 1 images of p.csv are missing under", "S15 a.png is missing")
    with pytest.raises(ConfigError, match="root is '../photos', which is not a folder"):
        load_pairs("p.csv", root="../photos")


def test_other_line_ends_are_part_of_a_caption(tmp_path: Path) -> None:
    write(tmp_path, a__png=PNG, p__jsonl='{"image": "a.png", "caption": "one\u2028two\x85three"}\n')
    write(tmp_path, p__csv='image,caption\na.png,"one\ntwo"\na.png,"a ""b"""\na.png\n')
    assert load_pairs(tmp_path / "p.jsonl")[0].caption == "one\u2028two\x85three"
    refused(tmp_path / "p.csv", "line 5: the header has 2 fields, this line has 1")
    write(tmp_path, p__csv='image,caption\na.png,"one\ntwo"\na.png,"a ""b"""\n')
    assert [pair.caption for pair in load_pairs(tmp_path / "p.csv")] == ["one\ntwo", 'a "b"']


def test_all_bad_lines_of_a_table_are_listed(tmp_path: Path) -> None:
    rows = [
        "image,caption", "a.png,a dog, a cat", "../a.png,x", "/a.png,x", "a.png,", "b.png,x", f"a.png,{'x' * 2001}",
        f"a.png,{'x' * 200_000}", 'a.png,"x" y', "C:\\a.png,x", "a.png,fine", 'a.png,"never closed',
    ]  # fmt: skip
    write(tmp_path, a__png=PNG, p__csv="\n".join(rows))
    text = refused(
        tmp_path / "p.csv", "line 2: the header has 2 fields, this line has 3", 'line 3: path "../a.png" leaves',
        "line 4: path", "line 5: the caption is ''", "S15 b.png is missing", "line 7: the caption is 'xxx",
        "line 8: not a row of a table: field larger", "line 9: not a row of a table", "line 10: path",
        "line 12: not a row",
    )  # fmt: skip
    assert "line 11" not in text and "line 1:" not in text


def test_all_bad_lines_of_json_are_listed(tmp_path: Path) -> None:
    rows = [
        "[]", '"image caption"', '{"image": "a.png"}', '{"image": "a.png", "caption": "\\ud800"}', "{" * 100_000,
        '{"image": ["a.png"], "caption": "x"}', '{"image": "a.png", "caption": ["x"]}', "9" * 9999,
        '{"image": "\\u0000", "caption": "x"}',
    ]  # fmt: skip
    write(tmp_path, a__png=PNG, p__jsonl="\n".join(rows))
    text = refused(tmp_path / "p.jsonl", "not valid Unicode", "S04 line 6: path ['a.png'] is not text")
    assert text.startswith("List of pairs") and "9 problems" in text and len(text) < 5000


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_bad_utf8_is_located(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"image,caption\na.png,caf\xe9\n")
    refused(tmp_path / name, "S01 line 2: byte 23 is not UTF-8", "save it as UTF-8")


def test_tables_without_the_columns_or_rows(tmp_path: Path) -> None:
    for header in ("picture,caption", "image", "a.png,an a", "image;caption"):
        write(tmp_path, a__png=PNG, p__csv=f"{header}\na.png,an a\n")
        refused(
            tmp_path / "p.csv", "line 1: the header is", "image or filepath or file_name", "caption or title or text"
        )
    for content in ("", "image,caption\n", "\n\n"):
        write(tmp_path, p__csv=content, p__jsonl="\n \n")
        refused(tmp_path / "p.csv", "S02 there are no lines with pairs")
        refused(tmp_path / "p.jsonl", "S02 there are no lines with pairs")


def test_links_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, secret__png=PNG, secret__txt="x", list_in_p__csv="image,caption\na.png,x\n")
    (tmp_path / "list" / "a.png").symlink_to("../secret.png")
    refused(tmp_path / "list" / "p.csv", 'S05 "a.png" is reached through a link that leaves')
    (tmp_path / "list" / "a.txt").symlink_to("../secret.txt")
    refused(tmp_path / "list", 'S05 "a.png" is reached', 'S05 "a.txt" is reached')
    monkeypatch.setenv("VLPROMPT_ALLOW_LINKS", "1")
    assert (
        captions(load_pairs(tmp_path / "list")) == captions(load_pairs(tmp_path / "list" / "p.csv")) == [("a.png", "x")]
    )


# -- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_with_text_files(tmp_path: Path) -> None:
    write(
        tmp_path, b__png=PNG, b__txt="a b\r\n\n  another b \n", a_in_c__JPG=JPG, a_in_c__txt="\ufeffa c", README__txt=""
    )
    write(tmp_path, B__v2__png=PNG, B__v2__txt="big", __hidden__png=PNG, __git_in_d__png=PNG)
    expected = [("B.v2.png", "big"), ("a/c.JPG", "a c"), ("b.png", "a b"), ("b.png", "another b")]
    assert captions(load_pairs(tmp_path)) == captions(load_pairs(f"{tmp_path}/")) == expected


def test_all_problems_of_a_folder_are_listed(tmp_path: Path) -> None:
    write(tmp_path, a__png=PNG, b__png=PNG, b__txt=" \n", c__png=PNG, c__txt=b"\xff\xfe", d__png=PNG, d__txt="x" * 2001)
    write(tmp_path, e__png=PNG, e__txt="x" * 2**21, real_in_f__png=PNG, real_in_f__txt="x")
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "g.png").symlink_to("nowhere.png")
    (tmp_path / "h\\i.png").write_bytes(PNG)
    (tmp_path / os.fsdecode(b"j\xff.png")).write_bytes(PNG)
    text = refused(
        tmp_path, "S15 a.png has no text file a.txt", "b.txt: the caption is ''", "c.txt: byte 0 is not UTF-8",
        "d.txt: the caption is 'xxx", "e.txt cannot be read or has more than 1,048,576 bytes",
        "S15 g.png is not a file",
        "S05 linked/ is a link to a folder", "has a backslash", "is not valid Unicode",
        "Every image needs a .txt of the same name",
    )  # fmt: skip
    assert text.startswith(f"Folder of pairs {tmp_path} cannot be used: 10 problems.")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "S02 there are no .tar files and no images (.jpg")
    with pytest.raises(ConfigError, match="root is '/', but root is only accepted for a list"):
        load_pairs(tmp_path, root="/")


# -- shards -----------------------------------------------------------------------------------------------------------
FIRST = {"./0.jpg": JPG, "0.txt": b"one\ntwo\n", "0.json": b"{", "x/1.seg.png": b"?", "x/1.png": PNG}
FIRST["x/1.json"] = json.dumps({"caption": " three ", "url": "http://x"}).encode()
SECOND = {"0.webp": encoded(".webp"), "0.txt": "vi\u00e9r".encode(), "__url__": b"?"}


def shards(folder: Path) -> Path:
    return write(folder, s_0__tar=tar_of(FIRST, "w"), s_1__tar=tar_of(SECOND, "w"), notes__md="", __s__tar=b"")


@pytest.mark.parametrize("source", ["", "s_{0..1}.tar"])
def test_shards(source: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path)
    pairs = load_pairs(tmp_path / source)
    expected = [("s_0.tar/0.jpg", "one"), ("s_0.tar/0.jpg", "two"), ("s_0.tar/x/1.png", "three")]
    assert captions(pairs) == [*expected, ("s_1.tar/0.webp", "vi\u00e9r")]
    assert captions(load_pairs(tmp_path / "s_0.tar")) == expected
    assert len({pair.source.stamp() for pair in pairs}) == 3
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a second pass"))
        assert load_pairs(tmp_path / source) == pairs
    for index in cache.iterdir():
        for damage in ("", '[0, 0, 9, "a.png", ""]', '[2, 0, 9, "a.png", ["x"]]', '[0, 0, 9, "a.png", [""]]'):
            passed = '"passed": {"kinds": {}, "litter": 0}'
            index.write_text(f'{{"schema": 2, "entries": [{damage}], {passed}}}' if damage else "{")
            assert load_pairs(tmp_path / source) == pairs


def test_patterns(tmp_path: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [str(path) for path in find_shards(Path(pattern))]

    assert names("a/{8..11}.tar") == ["a/8.tar", "a/9.tar", "a/10.tar", "a/11.tar"]
    assert names("{1..2}/{008..010}.tar")[2:4] == ["1/010.tar", "2/008.tar"] and names("a{0..1}.txt") == []
    for pattern in ("{2..1}.tar", "{0..100000}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(ConfigError, match="has a range that cannot be used"):
            load_pairs(pattern)
    for folder in "12":
        write(tmp_path / folder, s__tar=tar_of(SECOND, "w"))
    assert [pair.id for pair in load_pairs(tmp_path / "{1..2}" / "s.tar")] == ["1/s.tar/0.webp", "2/s.tar/0.webp"]
    refused(tmp_path / "{1..4}" / "s.tar", f"S15 shard {tmp_path}/3/s.tar is missing", "4/s.tar is missing")
    refused(str(tmp_path / "none.tar"), "S15", "none.tar is missing")


def test_all_problems_of_shards_are_listed(tmp_path: Path, cache: Path) -> None:
    files = {
        "a.jpg": JPG, "b.txt": b"x", "c.jpg": JPG, "c.json": b"[]", "d.jpg": JPG, "d.json": b'{"caption": null}',
        "e.jpg": JPG, "e.txt": b"\xff", "../f.jpg": JPG, "/g.jpg": JPG, "h.jpg": JPG, "h.png": PNG, "h.txt": b"x",
        "i.jpg": JPG, "i.txt": b"x" * 2**21,
    }  # fmt: skip
    stream = io.BytesIO(tar_of(files, "w"))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    write(tmp_path, bad__tar=stream.getvalue(), zipped__tar=tar_of(FIRST), cut__tar=tar_of(FIRST, "w")[:700])
    text = refused(
        tmp_path, "bad.tar: a has no caption (.txt or .json)", "b has no image (jpg", "h occurs twice", "S04",
        "'l.jpg' is a link", "shard zipped.tar cannot be read as a plain tar file", "cut.tar",
    )  # fmt: skip
    assert "e.txt: byte 0 is not UTF-8" in text and not cache.exists()
    refused(tmp_path / "bad.tar", "c.json: an object with", "i.txt cannot be read or has more", 'path "../f.jpg"')
    write(tmp_path / "none", s__tar=tar_of({"README.md": b"x"}, "w"))
    refused(tmp_path / "none", "S02 there are no images with captions")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8), cut=st.integers(0, 10240))
def test_damaged_shards_raise_data_errors(places: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    data = bytearray(tar_of({"0.png": PNG, "0.txt": b"x", "1.png": PNG, "1.json": b'{"caption": "y"}'}, "w"))
    for place, value in places:
        data[place] = value
    path = write(tmp_path, s__tar=bytes(data[:cut] if cut < 6000 else data)) / "s.tar"
    try:
        for pair in load_pairs(path):
            assert pair.caption.strip()
            pair.source.open()
    except DataError as error:
        assert "s.tar" in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), kind=st.sampled_from(["jsonl", "csv", "tsv"]), header=st.booleans())
def test_arbitrary_bytes_as_a_list_raise_data_errors(data: bytes, kind: str, header: bool, tmp_path: Path) -> None:
    path = tmp_path / f"p.{kind}"
    path.write_bytes((b"image\tcaption\n" if header else b"") + data)
    with pytest.raises(DataError, match="List of pairs"):
        load_pairs(path)


# -- names and paths --------------------------------------------------------------------------------------------------
def test_names_take_precedence_over_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo-pairs", "demo"):
        write(tmp_path / name, a__png=PNG, a__txt="x")
    assert (
        len(load_pairs("demo-pairs")) == 1200 and len(load_pairs("./demo-pairs")) == len(load_pairs(Path("demo"))) == 1
    )
    with pytest.raises(ConfigError, match="'demo' has classes, not captions.*; for your own files ./demo$"):
        load_pairs("demo")


@pytest.mark.parametrize(
    "source", ["demo_pears", "x.tar.gz", "a.png", "no.csv", "a\0b", "x" * 5000, "~nobody/x", "", 7]
)
def test_refused_sources(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, a__png=PNG, x__tar__gz=tar_of(FIRST)))
    with pytest.raises(ConfigError) as caught:
        load_pairs(source)
    if source not in ("", 7):
        assert "demo-pairs" in str(caught.value) and "shards-{0000..0009}.tar" in str(caught.value)
    if source == "demo_pears":
        assert "Did you mean 'demo-pairs'" in str(caught.value)
