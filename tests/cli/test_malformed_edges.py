"""Malformed inputs from the edges: values that are nearly right, files that are something else, hostile bytes.

``test_malformed.py`` holds the plain mistakes of every kind, ``io/test_damaged_heads.py`` heads; these go through the
command line in the same way and must end with status 2 and one screen that names the culprit, without a traceback and
without leaving anything behind.
"""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to see that such files are refused, and never read
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.cli.main import main
from vlprompt.datasets import card_class_names, find_card
from vlprompt.io import Head

Prepare = Callable[[Path], list[str]]
CASES: dict[str, tuple[Prepare, str]] = {}
DEMO = ["--backbone.name", "demo", "--data.shots", "1", "--trainer.progress", "false"]
COOP = ["train", "--method", "coop", *DEMO]


class Trap:
    """What unpickling would betray: it makes a file."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


def paint(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).convert(mode).save(path)
    return path


# -- configurations ---------------------------------------------------------------------------------------------------
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "larger than any": ("# " + "x" * 1_000_100 + "\nmethod: coop\n", "bad.yaml cannot be read: it has 1,000,"),
    "a bomb of aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nmethod: *b\n", "aliases (*name) are not accepted"),
    "nested without end": ("method: " + "[" * 3000 + "\n", "bad.yaml"),
    "tabs": ("data:\n\tshots: 4\n", "bad.yaml, line 2"),
    "two documents": ("method: coop\n---\nmethod: mocoop\n", "bad.yaml"),
    "a NUL": (b"method: co\0op\n", "bad.yaml"),
    "binary": (bytes(range(128, 256)), "bad.yaml, line 1: not UTF-8"),
    "not a number": ("method: coop\nrecipe: {lr: .nan}\n", "recipe.lr"),
    "endless number": ("method: coop\nrecipe: {lr: .inf}\n", "recipe.lr"),
    "true for a count": ("method: coop\nrecipe: {epochs: true}\n", "recipe.epochs is True"),
    "a quoted count": ('method: coop\ndata: {shots: "4"}\n', "data.shots is '4'"),
    "a fraction for a count": ("method: coop\ndata: {shots: 1.5}\n", "data.shots is 1.5"),
    "a list for a text": ("method: [coop]\n", "method is ['coop']"),
    "null for a count": ("method: coop\ndata: {shots: null}\n", "data.shots is None"),
    "a section as a list": ("method: coop\ndata: [shots, 4]\n", "'data' is a section"),
    "a dotted key": ("method: coop\ndata.shots: 4\n", "dotted keys are for the command line"),
    "no shots": ("method: coop\ndata: {shots: 0}\n", "data.shots is 0"),
    "seed below zero": ("method: coop\nseed: -1\n", "seed is -1"),
    "seed too large": ("method: coop\nseed: 4294967296\n", "seed is 4294967296"),
    "an enormous number": ("method: coop\nseed: " + "9" * 5000 + "\n", "seed"),
    "no context": ("method: coop\nsettings: {context_length: 0}\n", "settings.context_length is 0"),
    "context longer than the tower": (
        "method: coop\nsettings: {context_length: 75}\n",
        "settings.context_length is 75",
    ),
    "two slots": ("method: coop\ndata: {template: '{} and {}'}\n", "'{} and {}'"),
    "a slot with a name": ("method: zeroshot\nsettings: {templates: ['a {name}.']}\n", "a {name}."),
    "top of more experts than there are": ("method: mocoop\nsettings: {top_k: 5}\n", "settings.top_k is 5"),
    "setting of another method": ("method: zeroshot\nsettings: {context_length: 4}\n", "settings.context_length"),
    "warm-up longer than training": ("method: coop\nrecipe: {epochs: 1, warmup_epochs: 2}\n", "warmup_epochs is 2"),
    "empty name": ("method: ''\n", "method"),
    "text with a bell": ('method: coop\noutput: "ru\\ans"\n', "output"),
}
for _name, (_content, _culprit) in CONFIGS.items():

    def _config(folder: Path, content: str | bytes = _content) -> list[str]:
        (folder / "bad.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return ["train", "--config", "bad.yaml", *DEMO[:2]]

    CASES[f"config: {_name}"] = (_config, _culprit)

CALTECH_NAMES = card_class_names(find_card("caltech101")) or []


# -- split files ------------------------------------------------------------------------------------------------------
FULL = {part: [[f"{i}/{part}.jpg", i, CALTECH_NAMES[i]] for i in range(100)] for part in ("train", "val", "test")}


def first(item: Any, part: str = "train") -> dict[str, Any]:
    """The whole split with another first item."""
    return {**FULL, part: [item, *FULL[part][1:]]}


def with_split(content: Any, change: Callable[[Path], None] = lambda base: None) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        base = folder / "data" / "caltech-101"
        picture = paint(base / "one.jpg").read_bytes()
        for part in FULL.values():
            for name, _, _ in part:
                place = base / "101_ObjectCategories" / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(picture)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (base / "split_zhou_Caltech101.json").write_bytes(raw)
        change(base)
        return ["train", "--method", "zeroshot", *DEMO, "--data.name", "caltech101", "--data.root", "data"]

    return prepare


def a_directory(base: Path) -> None:
    (base / "split_zhou_Caltech101.json").unlink()
    (base / "split_zhou_Caltech101.json").mkdir()


def image_as_directory(base: Path) -> None:
    (base / "101_ObjectCategories/7/train.jpg").unlink()
    (base / "101_ObjectCategories/7/train.jpg").mkdir()


def image_linked_out(base: Path) -> None:
    place = base / "101_ObjectCategories/7/train.jpg"
    place.unlink()
    place.symlink_to(paint(base.parent / "secret.jpg"))


def all_damaged(base: Path) -> None:
    for place in (base / "101_ObjectCategories").glob("*/test.jpg"):
        place.write_bytes(place.read_bytes()[:200])


SPLITS: dict[str, tuple[Prepare, str]] = {
    "empty": (with_split(b""), "split_zhou_Caltech101.json is not valid JSON"),
    "byte order mark": (with_split(b"\xef\xbb\xbf{}"), "split_zhou_Caltech101.json is not valid JSON"),
    "not UTF-8": (with_split(b'{"train": "\xff"}'), "split_zhou_Caltech101.json is not valid JSON"),
    "NaN": (with_split(b'{"train": NaN, "val": [], "test": []}'), "NaN is not JSON"),
    "nested without end": (
        with_split(b"[" * 100_000),
        "split_zhou_Caltech101.json is not valid JSON: it is nested too deeply",
    ),
    "a part as a table": (with_split({**FULL, "test": {"a": 1}}), "'test' is a dict"),
    "nothing to train on": (with_split({**FULL, "train": []}), "'train' is empty"),
    "item as a text": (with_split(first("0/train.jpg")), "train[0]: expected [path, label, class name], got a str"),
    "label below zero": (with_split(first(["0/train.jpg", -1, "thing 0"])), "label -1 is out of range"),
    "label true": (with_split(first(["0/train.jpg", True, "thing 0"])), "label True is a bool"),
    "label beyond all": (with_split(first(["0/train.jpg", 10**30, "thing 0"])), "is out of range"),
    "path as a number": (with_split(first([7, 0, "thing 0"])), "path 7 is not text"),
    "path with a NUL": (with_split(first(["0/tr\0ain.jpg", 0, "thing 0"])), "has control characters"),
    "path with a drive": (with_split(first(["C:0/train.jpg", 0, "thing 0"])), '"C:0/train.jpg" is absolute'),
    "path not simple": (with_split(first(["./0//train.jpg", 0, "thing 0"])), "not in its simplest form"),
    "path without end": (with_split(first(["a/" * 600 + "x.jpg", 0, "thing 0"])), "at most 1,024 are accepted"),
    "path in half a character": (with_split(first(["0/\ud800.jpg", 0, "thing 0"])), "is not valid Unicode"),
    "image twice": (with_split({**FULL, "val": [FULL["val"][0], *FULL["val"]]}), "0/val.jpg is twice in val"),
    "label only in test": (
        with_split({**FULL, "train": FULL["train"][:-1], "val": FULL["val"][:-1]}),
        f"label 99 ({CALTECH_NAMES[99]!r}) never occurs in train",
    ),
    "a directory": (with_split(FULL, a_directory), "split_zhou_Caltech101.json"),
    "image is a directory": (with_split(FULL, image_as_directory), "7/train.jpg"),
    "image linked from outside": (with_split(FULL, image_linked_out), '"7/train.jpg" is reached through a link'),
    "damaged test images": (with_split(FULL, all_damaged), "test.jpg cannot be decoded"),
    "no image folder": (
        with_split(FULL, lambda base: shutil.rmtree(base / "101_ObjectCategories")),
        "101_ObjectCategories (the image folder is missing)",
    ),
}
for _name, _case in SPLITS.items():
    CASES[f"split: {_name}"] = _case

# -- folders of images, and class names in them -----------------------------------------------------------------------
FOLDER = [*COOP, "--data.name", "folder", "--data.root", "mine", "--settings.context_length", "2"]


def with_folder(change: Callable[[Path], Any], *classes: str) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        for name in classes or ("apple", "bell"):
            for i in range(4):
                paint(folder / "mine" / name / f"{i}.png")
        change(folder / "mine")
        return FOLDER

    return prepare


def all_of(pattern: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(mine: Path) -> None:
        for place in sorted(mine.glob(pattern)):
            place.unlink()
            make(place)

    return change


def linked_class(mine: Path) -> None:
    shutil.move(mine / "bell", mine.parent / "elsewhere")
    (mine / "bell").symlink_to(mine.parent / "elsewhere")


IMAGES: dict[str, tuple[Prepare, str]] = {
    "directory named x.jpg": (with_folder(all_of("bell/0.png", lambda p: p.with_suffix(".jpg").mkdir())), "0.jpg/"),
    "sixteen bits": (
        with_folder(all_of("bell/*", lambda p: Image.new("I;16", (40, 40), 4000).save(p))),
        "more than 8 bits per channel",
    ),
    "pickle as PNG": (with_folder(all_of("bell/*", lambda p: p.write_bytes(pickle.dumps(Trap())))), "bell/"),
    "SVG as PNG": (with_folder(all_of("bell/*", lambda p: p.write_text("<svg width='9'/>"))), "unknown image format"),
    "random bytes behind a JPEG's": (
        with_folder(all_of("bell/*", lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 9))),
        "cannot be decoded",
    ),
    "a fifo": (with_folder(all_of("bell/*", os.mkfifo)), "bell/ holds no images"),
    "images without classes": (
        with_folder(lambda mine: [shutil.rmtree(mine), paint(mine / "x.png")]), "1 image but no class folders"
    ),
    "a class without images": (with_folder(all_of("bell/*", lambda p: p.with_suffix(".txt").touch())), "bell/ holds"),
    "a class linked from outside": (with_folder(linked_class), "bell/ is a link to a place outside"),
    "folders in a class": (with_folder(lambda mine: (mine / "bell/more").mkdir()), "more/"),
    "train without test": (with_folder(lambda mine: None, "train/apple", "train/bell"), "no test/"),
    "a test class that is not trained": (
        with_folder(lambda mine: None, "train/apple", "train/bell", "test/apple", "test/bells"), "'bells' is not in"
    ),
    "root is a file": (with_folder(lambda mine: [shutil.rmtree(mine), mine.touch()]), "mine (not a folder)"),
}  # fmt: skip
for _name, _case in IMAGES.items():
    CASES[f"image: {_name}"] = _case

for _name, (_folder, _culprit) in {
    "braces": ("a {} b", "'a {} b' has braces"),
    "line break": ("a\nb", "unprintable characters"),
    "only a joiner": ("\u200d", "class name"),
    "too long": ("b" * 201, "has 201 characters"),
    "bytes that are no text": (os.fsdecode(b"caf\xe9"), "'caf\\udce9'"),
    "more tokens than fit": ("1234567890 " * 8 + "x", "1234567890 1234567890"),
}.items():
    CASES[f"class name: {_name}"] = (with_folder(lambda mine: None, "apple", _folder), _culprit)


# -- a head to predict and evaluate with ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), ["apple", "bell"], context_length=2)
    return Head(method).save_pretrained(tmp_path_factory.mktemp("good") / "head")


# -- weights and command lines ----------------------------------------------------------------------------------------
def with_file(name: str, data: bytes, *words: str) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return list(words)

    return prepare


RUN = ["train", "--method", "zeroshot", "--data.shots", "1"]
WEIGHTS = [*RUN, "--backbone.name", "from-file", "--backbone.pretrained"]
COMMANDS: dict[str, tuple[Prepare | list[str], str]] = {
    "weights in a pickle": (with_file("w.pt", pickle.dumps(Trap()), *WEIGHTS, "w.pt"), "w.pt"),
    "weights cut short": (with_file("w.safetensors", b"\x40" + bytes(30), *WEIGHTS, "w.safetensors"), "w.safetensors"),
    "weights not there": ([*WEIGHTS, "w.pt"], "w.pt"),
    "weights of nothing": ([*RUN, "--backbone.name", "from-file"], "from-file"),
    "a folder without a configuration": (
        with_file("w/x.bin", b"", *RUN, "--backbone.name", "local-dir:w"), "open_clip_config.json"
    ),
    "a folder that is not there": ([*RUN, "--backbone.name", "local-dir:w"], "'w'"),
    "other weights for the demo": ([*RUN, "--backbone.name", "demo", "--backbone.pretrained", "laion2b"], "laion2b"),
    "unknown precision": ([*COOP, "--backbone.precision", "fp8"], "backbone.precision is 'fp8'"),
    "results into a file": (with_file("taken", b"", *RUN, *DEMO[:2], "--output", "taken"), "--output"),
    "results below a file": (with_file("taken", b"", *RUN, *DEMO[:2], "--output", "taken/x"), "--output"),
    "an empty word": ([*COOP, ""], "''"),
    "an empty value": ([*COOP, "--data.root="], "--data.root is ''; accepted: a text that is not empty, or null"),
    "dashes alone": ([*COOP, "--"], "'--'"),
    "an option without a name": ([*COOP, "--=4"], "'--=4'"),
    "one dash": ([*COOP, "-seed", "4"], "'-seed'"),
    "a value without end": ([*COOP, "--data.name", "x" * 100_000], "data.name"),
    "a key without end": ([*COOP, "--" + "x" * 100_000, "1"], "xxx"),
    "an escape sequence": ([*COOP, "--output", "\x1b[2Jruns"], "output"),
    "bytes that are no text": ([*COOP, "--output", os.fsdecode(b"r\xff")], "output"),
    "a table for a list": ([*COOP, "--settings.context_length", "{a: 1}"], "settings.context_length"),
    "a configuration that is a folder": ([*COOP, "--config", "."], "this is a folder"),
    "a folder of no images": (with_file("none/x.txt", b"", "predict", "head", "none"), "none: a folder"),
    "an image name without end": (["predict", "head", "x" * 5000], "there is no such file"),
    "an image that is missing beside a bad one": (
        with_file("none/a.png", b"", "predict", "head", "none/a.png", "none/b.png"), "none/b.png: there is no such file"
    ),
    "more classes than a number": (["predict", "head", "x.png", "--top", "9999999"], "--top is '9999999'"),
    "evaluation without the data": (["eval", "head"], "--data.name"),
    "evaluation of data that are not there": (["eval", "head", "--data.name", "dtd", "--data.root", "no"], "dtd"),
    "list with a bad pattern": (["list", "methods", "[z"], "'[z'"),
}  # fmt: skip
if not torch.cuda.is_available():
    COMMANDS["a graphics card that is not here"] = ([*COOP, "--trainer.accelerator", "gpu"], "gpu")
for _name, (_words, _culprit) in COMMANDS.items():
    CASES[f"command: {_name}"] = (_words if callable(_words) else lambda _, words=_words: list(words), _culprit)


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_one_screen_that_names_the_culprit(
    name: str, good_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(good_head, tmp_path / "head")
    prepare, culprit = CASES[name]
    words = prepare(tmp_path)
    before = everything_in(tmp_path)
    assert main(words) == 2
    out, text = capsys.readouterr()
    assert culprit in text and out == ""
    assert not (tmp_path / "sprung").exists()
    assert "Traceback" not in text and "\x1b" not in text
    assert sum(max(1, -(-len(line) // 100)) for line in text.splitlines()) <= 24  # rows of a terminal
    # Features that could be computed stay in the cache. A run that met a bad image on its way keeps what it was made
    # from, and may be resumed; nothing else is ever left, least of all something half-written.
    left = {path for path in everything_in(tmp_path) - before if not path.startswith("cache/")} - {"cache"}
    files = {Path(path).name for path in left if (tmp_path / path).is_file() and not path.endswith(".lock")}
    assert files <= (
        {"config.yaml", "env.json", "images.json", "split.json"} if "decode" in text or "8 bits" in text else set()
    )


def test_many_of_every_kind() -> None:
    kinds = [name.partition(":")[0] for name in CASES]
    least = {"config": 25, "split": 20, "image": 12, "class name": 6, "command": 25}
    assert {kind: kinds.count(kind) >= count for kind, count in least.items()} == dict.fromkeys(least, True)
