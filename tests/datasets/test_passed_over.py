"""What readers pass over is counted by kind and said, for every reader of files; and which files they read."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.datasets.archives import tar_of
from tests.datasets.layouts import encoded
from vlprompt.datasets import find_card
from vlprompt.datasets.acquire.check import check
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.images import IMAGE_SUFFIXES, decode_rgb, is_image
from vlprompt.datasets.options import FolderOptions, ShardOptions, SplitJsonOptions
from vlprompt.datasets.passed import PassedOver
from vlprompt.datasets.readers import read_dataset
from vlprompt.errors import DataError
from vlprompt.pairs import load_pairs
from vlprompt.runs.predict import image_files

PNG = encoded(".png")
FOLDER = find_card("folder")
#: Files that no reader takes for images, and the kind that each is counted as.
OTHERS = {"a.txt": ".txt", "b.MP4": ".mp4", "notes": "without suffix", "v1.2 x.psd": ".psd"}
LITTER = ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png")


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)


def own_card(reader: str, options: SplitJsonOptions | ShardOptions | FolderOptions) -> Card:
    return Card("toy", reader, options, Classes(2, "list", ("cat", "dog")), Templates("{}"), group=("own",))


def of_folder(root: Path, others: list[str]) -> list[str]:
    files(root, *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)))
    files(root, *(f"cat/{name}" for name in others))
    lists = read_dataset(FOLDER, root)
    return [sample.id for sample in [*lists.train, *lists.val, *lists.test]]


def of_given_split(root: Path, others: list[str]) -> list[str]:
    files(
        root, *(f"{split}/{name}/{n}.png" for split in ("train", "test") for name in ("cat", "dog") for n in range(2))
    )
    files(root, *(f"test/dog/{name}" for name in others))
    lists = read_dataset(FOLDER, root)
    return [sample.id for sample in [*lists.train, *lists.test]]


def of_card_folders(root: Path, others: list[str]) -> list[str]:
    files(
        root, *(f"{split}/{name}/{n}.png" for split in ("train", "test") for name in ("cat", "dog") for n in range(2))
    )
    files(root, *(f"train/cat/{name}" for name in others))
    options = FolderOptions(splits={"train": ("train",), "test": ("test",)})
    lists = read_dataset(own_card("folder", options), root)
    return [sample.id for sample in [*lists.train, *lists.test]]


def of_shards(root: Path, others: list[str]) -> list[str]:
    for split in ("train", "test"):
        members = {f"{n}.png": PNG for n in range(4)} | {f"{n}.cls": str(n % 2).encode() for n in range(4)}
        members |= dict.fromkeys(others, b"x") if split == "train" else {}
        (root / split).mkdir(exist_ok=True)
        (root / split / "0.tar").write_bytes(tar_of(members, "w"))
        (root / split / "nshards.txt").write_text("1")
    options = ShardOptions(splits={"train": ("train",), "test": ("test",)})
    lists = read_dataset(own_card("shards", options), root)
    return [sample.id for sample in [*lists.train, *lists.test]]


def of_pairs_folder(root: Path, others: list[str]) -> list[str]:
    files(root, *(f"{n}.png" for n in range(4)), *others)
    for n in range(4):
        (root / f"{n}.txt").write_text("a word")
    return [pair.id for pair in load_pairs(root)]


def of_pairs_shards(root: Path, others: list[str]) -> list[str]:
    members = {f"{n}.png": PNG for n in range(4)} | {f"{n}.txt": b"a word" for n in range(4)}
    (root / "0.tar").write_bytes(tar_of(members, "w"))
    files(root, *others)
    return [pair.id for pair in load_pairs(root)]


def of_predict(root: Path, others: list[str]) -> list[str]:
    files(root, *(f"{n}.png" for n in range(4)), *others)
    return [path.name for path in image_files([root])]


READERS: dict[str, Callable[[Path, list[str]], list[str]]] = {
    "folder": of_folder,
    "given split": of_given_split,
    "folders of a card": of_card_folders,
    "shards": of_shards,
    "pairs in a folder": of_pairs_folder,
    "pairs in shards": of_pairs_shards,
    "predict": of_predict,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))


def notes_of(read: Callable[[], list[str]]) -> tuple[list[str], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = read()
    texts = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    assert len(texts) <= 1
    return ids, "".join(texts)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_counts_what_it_passes_over(reader: str, tmp_path: Path) -> None:
    plain, nothing = notes_of(lambda: READERS[reader](_made(tmp_path / "plain"), []))
    assert nothing == ""
    root = _made(tmp_path / "others")
    chosen = [*OTHERS, *LITTER]
    ids, text = notes_of(lambda: READERS[reader](root, chosen))
    assert ids == plain
    assert "4 files are passed over" in text, text
    assert notes_of(lambda: READERS[reader](root, chosen)) == (ids, text)  # also from a stored index


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_litter_of_operating_systems_is_not_mentioned(reader: str, tmp_path: Path) -> None:
    assert notes_of(lambda: READERS[reader](tmp_path, list(LITTER)))[1] == ""


def test_kinds_and_examples_are_named(tmp_path: Path) -> None:
    _, text = notes_of(lambda: of_folder(tmp_path, list(OTHERS)))
    assert text.endswith(
        "1 .mp4 (cat/b.MP4), 1 .psd (cat/v1.2 x.psd), 1 .txt (cat/a.txt), 1 without suffix (cat/notes)"
    )


def test_check_counts_them_too(tmp_path: Path) -> None:
    notes_of(lambda: of_folder(tmp_path, [*OTHERS, *LITTER]))
    files(tmp_path, "loose.png")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "cat" / "nothing.png")
    checked = check(FOLDER, tmp_path)
    assert checked.facts["passed_over"] == {
        ".mp4": 1, ".psd": 1, ".txt": 1, "images outside the class folders": 1,
        "neither a file nor a link to one": 1, "without suffix": 1, "litter": 4,
    }  # fmt: skip
    assert [problem.warning for problem in checked.problems if problem.code == "S21"] == [True]


@pytest.mark.parametrize("archive", [None, "all.zip"])
def test_images_of_the_user_that_no_list_names_are_counted(archive: str | None, tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    if archive:
        with zipfile.ZipFile(tmp_path / archive, "w") as file:
            for name in [*names, "cat/new.png", "cat/new.txt"]:
                file.writestr(name, PNG)
    else:
        files(tmp_path, *names, "cat/new.png", "cat/new.txt")
    listed = [[name, int(name.startswith("dog")), name.partition("/")[0]] for name in names]
    split = {"train": listed[::3] + listed[1::3], "val": [], "test": listed[2::3]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    card = own_card("split_json", SplitJsonOptions("split.json", archive=archive))
    with pytest.warns(UserWarning, match=r"1 file is passed over: 1 images that no list names \(cat/new.png\)"):
        assert len(read_dataset(card, tmp_path).train) == 4


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_kind_of_image_is_read_wherever_images_are_looked_for(suffix: str, tmp_path: Path) -> None:
    assert is_image(f"x{suffix}") and is_image(f"X{suffix.upper()}")
    names = [f"cat/{n}{suffix if n else suffix.upper()}" for n in range(4)]
    files(tmp_path, *names, *(f"dog/{n}.png" for n in range(4)))
    lists = read_dataset(FOLDER, tmp_path)
    assert {sample.id for part in (lists.train, lists.val, lists.test) for sample in part} >= set(names)
    assert len(image_files([tmp_path / "cat"])) == 4
    (tmp_path / "shard.tar").write_bytes(tar_of({f"k{suffix}": PNG, "k.txt": b"word"}, "w"))
    assert [pair.id for pair in load_pairs(tmp_path / "shard.tar")] == [f"shard.tar/k{suffix}"]


@pytest.mark.parametrize("form", ["JPEG2000", "AVIF"])
def test_newer_formats_are_decoded_where_pillow_can(form: str) -> None:
    data = io.BytesIO()
    try:
        Image.new("RGB", (16, 12), "red").save(data, form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {form}")
    assert decode_rgb(data.getvalue(), "x").size == (16, 12)


@pytest.mark.parametrize(("brand", "fix"), [("heic", "pip install pillow-heif"), ("avif", "Pillow 11.3 or later")])
def test_a_missing_decoder_is_named(brand: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprompt.datasets import images

    monkeypatch.setattr(images, "_decoders", lambda: ("JPEG", "PNG"))
    data = b"\0\0\0\x18ftyp" + brand.encode() + bytes(100)
    with pytest.raises(DataError, match=fix):
        decode_rgb(data, f"x.{brand}")


# -- names with several dots in shards --------------------------------------------------------------------------------
@given(st.lists(st.text("ab1. -", min_size=1, max_size=8).filter(lambda s: s[0] not in ". "), unique=True, min_size=1))
def test_keys_with_dots_are_read_whole_or_counted(stems: list[str]) -> None:
    from vlprompt.datasets.paths import path_problem
    from vlprompt.datasets.readers.tar_files import by_key
    from vlprompt.datasets.report import Report

    stems = [stem for stem in stems if not path_problem(f"{stem}.png")]
    members = {f"{stem}.png": PNG for stem in stems} | {f"{stem}.txt": b"word" for stem in stems}
    report = Report("", "")
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        (Path(folder) / "0.tar").write_bytes(tar_of(members, "w"))
        found = by_key(Path(folder) / "0.tar", "0.tar", ("txt",), report)
    assert sorted(found) == sorted(stems) and all(kinds.keys() == {"image", "txt"} for kinds in found.values())
    assert not report.problems and not report.passed.counts()


def test_further_fields_are_no_images(tmp_path: Path) -> None:
    members = {"1.png": PNG, "1.txt": b"word", "1.mask.png": PNG, "2.png": PNG, "2.txt": b"word", "2.meta.yaml": b""}
    (tmp_path / "0.tar").write_bytes(tar_of(members, "w"))
    with pytest.warns(UserWarning, match=r"2 files are passed over: 1 .mask.png \(1.mask.png\), 1 .meta.yaml"):
        assert [pair.id for pair in load_pairs(tmp_path / "0.tar")] == ["0.tar/1.png", "0.tar/2.png"]


def test_control_characters_do_not_reach_the_text() -> None:
    passed = PassedOver()
    passed.add("a/\x1b[31mx.t\x1bt")
    assert passed.text().isprintable()


# -- names of classes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("folders", "kind"),
    [
        (("0", "1", "10"), "numbers"),
        (("n01440764", "n01443537"), "WordNet ids"),
        (("a" * 11 + "1", "b" * 12 + "2"), "hex"),
    ],
)
def test_numbers_and_ids_as_class_names_are_remarked_upon(folders: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    files(tmp_path, *(f"{name}/{n}.png" for name in folders for n in range(4)))
    with pytest.warns(UserWarning, match=f"class names are {kind}.*classes.json"):
        read_dataset(FOLDER, tmp_path)


NAMES = {
    "classes.json": json.dumps({"0": "cat", "1": "sea lion"}),
    "names.txt": "0 cat\n\n1\tsea lion\n",
}


@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("given_split", [False, True])
def test_a_file_names_the_class_folders(file: str, given_split: bool, tmp_path: Path) -> None:
    places = [f"{split}/{n}" for split in ("train", "test") for n in (0, 1)] if given_split else ["0", "1"]
    files(tmp_path, *(f"{place}/{n}.png" for place in places for n in range(4)))
    with pytest.warns(UserWarning, match="are numbers"):
        before = read_dataset(FOLDER, tmp_path)
    (tmp_path / file).write_text(NAMES[file])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lists = read_dataset(FOLDER, tmp_path)
    assert lists.class_names == ["cat", "sea lion"]
    assert (lists.train, lists.val, lists.test) == (before.train, before.val, before.test)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("classes.json", '{"0": "cat", "2": "dog"}', "no class folder '2'"),
        ("classes.json", '{"0": "cat"}', "no name for class folder '1'"),
        ("classes.json", '{"0": "cat", "1": 7}', "class name 7 is not text"),
        ("classes.json", '{"0": "cat", "0": "dog"}', "is given twice"),
        ("classes.json", '["cat", "dog"]', "holds a list"),
        ("classes.json", "[" * 100_000, "not valid JSON|nested"),
        ("classes.json", '{"0": "cat", "1": "cat"}', "labels 0 and 1 are both 'cat'"),
        ("names.txt", "0 cat\n0 dog\n1 eel\n", "names.txt:2: class folder '0' appears twice"),
        ("names.txt", "cat\ndog\n", "no class folder 'cat'"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(file: str, content: str, problem: str, tmp_path: Path) -> None:
    files(tmp_path, *(f"{name}/{n}.png" for name in (0, 1) for n in range(4)))
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=problem):
        read_dataset(FOLDER, tmp_path)


def test_an_empty_class_in_test_is_as_good_as_a_missing_one(tmp_path: Path) -> None:
    files(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test") for name in ("cat", "dog")))
    (tmp_path / "train" / "eel").mkdir()
    files(tmp_path, "train/eel/0.png")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 class without test images: eel"):
            assert read_dataset(FOLDER, tmp_path).class_names == ["cat", "dog", "eel"]
        (tmp_path / "test" / "eel").mkdir(exist_ok=True)


def test_names_that_give_one_prompt_are_grouped(tmp_path: Path) -> None:
    files(tmp_path, *(f"{name}/{n}.png" for name in ("Sea_Lion", "sea lion", "cat") for n in range(4)))
    problems = [problem for problem in check(FOLDER, tmp_path).problems if problem.code == "S10"]
    assert ["'Sea_Lion' and 'sea lion'" in problem.text for problem in problems] == [True]
