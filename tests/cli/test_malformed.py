"""Malformed configurations, split files, images, class names, heads and command lines, each through the command line.

Every one ends with status 2 and one screen that names the culprit: no traceback, no silent default, no partial file.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlprompt.cli.main import main
from vlprompt.datasets import card_class_names, find_card

ROOT = Path(__file__).parents[2]
Prepare = Callable[[Path], list[str]]
CASES: dict[str, tuple[Prepare, str]] = {}


def case(name: str, culprit: str) -> Callable[[Prepare], Prepare]:
    """Enrol a malformed input: what it prepares in a folder, the command line, and the text that must name it."""

    def enrol(prepare: Prepare) -> Prepare:
        assert name not in CASES
        CASES[name] = (prepare, culprit)
        return prepare

    return enrol


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))


def screen(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


# -- configurations ---------------------------------------------------------------------------------------------------
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "bad.yaml"),
    "not a mapping": ("- method\n- coop\n", "bad.yaml"),
    "broken YAML": ("method: [coop\n", "bad.yaml"),
    "bad UTF-8": (b"method: \xff\xfe\n", "bad.yaml"),
    "key twice": ("method: coop\nmethod: mocoop\n", "method"),
    "unknown section": ("method: coop\noptimizer: {lr: 1}\n", "optimizer"),
    "unknown key": ("method: coop\ndata: {shot: 4}\n", "data.shots"),
    "text for a number": ("method: coop\nrecipe: {epochs: many}\n", "recipe.epochs"),
    "unknown method": ("method: cocop\n", "coop"),
    "groups that do not add up": ("method: mocoop\nsettings: {groups: [1, 1]}\n", "settings.groups"),
    "template without a slot": ("method: zeroshot\nsettings: {templates: [a photo]}\n", "a photo"),
    "python tag": ("method: !!python/object/apply:os.system [ls]\n", "bad.yaml"),
    "negative rate": ("method: coop\nrecipe: {lr: -1}\n", "recipe.lr"),
}
for _name, (_content, _culprit) in CONFIGS.items():

    def _config(folder: Path, content: str | bytes = _content) -> list[str]:
        (folder / "bad.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return ["train", "--config", "bad.yaml"]

    case(f"config: {_name}", _culprit)(_config)


CALTECH_NAMES = card_class_names(find_card("caltech101")) or []


# -- split files ------------------------------------------------------------------------------------------------------
GOOD = {
    part: [[f"{name}/{part}{i}.jpg", label, name] for label, name in enumerate(("cup", "ant")) for i in range(2)]
    for part in ("train", "val", "test")
}


FULL = {  # as many classes as the card says, for what is judged after the counts
    part: [[f"{label}/{part}.jpg", label, CALTECH_NAMES[label]] for label in range(100)]
    for part in ("train", "val", "test")
}


def with_split(content: Any, images: dict[str, Any] = GOOD, missing: bool = False) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        base = folder / "data" / "caltech-101"
        for part in images.values():
            for path, _, _ in part:
                place = base / "101_ObjectCategories" / path
                place.parent.mkdir(parents=True, exist_ok=True)
                if not missing:
                    Image.new("RGB", (16, 16), (200, 30, 30)).save(place)
        text = content if isinstance(content, str) else json.dumps(content)
        (base / "split_zhou_Caltech101.json").write_text(text)
        options = ["--data.name", "caltech101", "--data.root", "data", "--data.shots", "1", "--backbone.name", "demo"]
        return ["train", "--method", "zeroshot", *options]

    return prepare


def changed(part: str, index: int, item: Any, split: dict[str, Any] = GOOD) -> dict[str, Any]:
    return {**split, part: [*split[part][:index], item, *split[part][index + 1 :]]}


SPLITS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{train", "split_zhou_Caltech101.json"),
    "a list": ([1, 2], "split_zhou_Caltech101.json"),
    "no test": ({"train": GOOD["train"], "val": []}, "test"),
    "unknown part": ({**GOOD, "extra": []}, "extra"),
    "key twice": (json.dumps(GOOD)[:-1] + ', "train": []}', "train"),
    "two values": (changed("test", 0, ["cup/test0.jpg", 0]), "test[0]"),
    "path out of the folder": (changed("train", 0, ["../../etc/x.jpg", 0, "cup"]), "../../etc/x.jpg"),
    "absolute path": (changed("train", 0, ["/etc/x.jpg", 0, "cup"]), "/etc/x.jpg"),
    "backslash": (changed("train", 0, ["cup\\train0.jpg", 0, "cup"]), "train[0]"),
    "label as text": (changed("train", 0, ["cup/train0.jpg", "0", "cup"]), "train[0]"),
    "label as fraction": (changed("train", 0, ["cup/train0.jpg", 0.5, "cup"]), "0.5"),
    "label left out": ({k: [[p, 2 * y, n] for p, y, n in v] for k, v in GOOD.items()}, "label"),
    "one-based": ({k: [[p, y + 1, n] for p, y, n in v] for k, v in GOOD.items()}, "1"),
    "two names": (changed("test", 0, ["cup/test0.jpg", 0, "mug"]), "mug"),
    "image in two parts": (changed("test", 0, ["cup/train0.jpg", 0, "cup"]), "cup/train0.jpg"),
    "too few classes": (GOOD, "S20 2 classes; caltech101 has 100"),
}
for _name, (_content, _culprit) in SPLITS.items():
    case(f"split: {_name}", _culprit)(with_split(_content))
_gone = changed("test", 0, ["0/gone.jpg", 0, "thing 0"], FULL)
case("split: missing image", "0/gone.jpg")(with_split(_gone, images=FULL))
case("split: no images at all", "300")(with_split(FULL, images=FULL, missing=True))


@case("split: none", "split_zhou_Caltech101.json")
def no_split(folder: Path) -> list[str]:
    words = with_split(GOOD)(folder)
    (folder / "data/caltech-101/split_zhou_Caltech101.json").unlink()
    return words


# -- class names ------------------------------------------------------------------------------------------------------
for _name, _bad in {"empty": "", "blank": "  ", "brace": "c{}p", "control character": "c\u0007up", "text": 7}.items():
    _items = {k: [[p, y, _bad if n == "cup" else n] for p, y, n in v] for k, v in GOOD.items()}
    case(f"class name: {_name}", "train[0]")(with_split(_items))
_wide = {k: [[p, y, "1234567890" * 9 if y == 3 else n] for p, y, n in v] for k, v in FULL.items()}
case("class name: too many tokens", "12345678901234567890")(with_split(_wide, images=FULL))


# -- images -----------------------------------------------------------------------------------------------------------
def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def picture(folder: Path, name: str) -> bytes:
    path = folder / name
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.unlink()
    return data


def with_images(name: str, make: Callable[[Path], bytes], count: int = 4) -> Prepare:
    """A folder of two classes; every image of the second is ``make``'s, so whatever is drawn meets it."""

    def prepare(folder: Path) -> list[str]:
        for kind in ("apple", "bell"):
            (folder / "mine" / kind).mkdir(parents=True)
            for i in range(count):
                path = folder / "mine" / kind / f"{i}-{name}"
                path.write_bytes(make(folder) if kind == "bell" else picture(folder, f"x{Path(name).suffix}"))
        return ["train", "--method", "coop", "--data.name", "folder", "--data.root", "mine", "--backbone.name", "demo"]

    return prepare


IMAGES: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty file": ("a.jpg", lambda _: b"", "bell/"),
    "text as JPEG": ("a.jpg", lambda _: b"these are words, not pixels", "bell/"),
    "truncated JPEG": ("a.jpg", lambda f: picture(f, "y.jpg")[:900], "bell/"),
    "truncated PNG": ("a.png", lambda f: picture(f, "y.png")[:900], "bell/"),
    "header only": ("a.png", lambda f: picture(f, "y.png")[:24], "bell/"),
    "decompression bomb": ("a.png", lambda _: bomb(), "bell/"),
    "PostScript as PNG": ("a.png", lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "bell/"),
}
for _name, (_file, _make, _culprit) in IMAGES.items():
    case(f"image: {_name}", _culprit)(with_images(_file, _make))
case("image: one in a class", "bell")(with_images("a.png", lambda f: picture(f, "y.png"), count=1))


@case("image: folder without classes", "mine")
def no_classes(folder: Path) -> list[str]:
    (folder / "mine").mkdir()
    return ["train", "--method", "coop", "--data.name", "folder", "--data.root", "mine", "--backbone.name", "demo"]


@case("image: link out of the folder", "bell/")
def link_out(folder: Path) -> list[str]:
    words = with_images("a.png", lambda f: picture(f, "y.png"))(folder)
    (folder / "secret.png").write_bytes(picture(folder, "y.png"))
    for path in (folder / "mine/bell").iterdir():
        path.unlink()
        os.symlink(folder / "secret.png", path)
    return words


@case("image: prediction of a missing file", "gone.png")
def predict_missing(folder: Path) -> list[str]:
    return ["predict", str(good_head(folder)), "gone.png"]


@case("image: prediction of a text file", "words.png")
def predict_text(folder: Path) -> list[str]:
    (folder / "words.png").write_text("no pixels")
    return ["predict", str(good_head(folder)), "words.png"]


# -- heads ------------------------------------------------------------------------------------------------------------
def good_head(folder: Path) -> Path:
    import vlprompt
    from vlprompt.io import Head

    backbone = vlprompt.load_backbone("demo")
    method = vlprompt.create_method("coop", backbone, ["red apple", "bell"], context_length=2)
    return Head(method).save_pretrained(folder / "head")


def with_head(damage: Callable[[Path], None]) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        head = good_head(folder)
        damage(head)
        Image.new("RGB", (32, 32)).save(folder / "x.png")
        return ["predict", str(head), "x.png"]

    return prepare


def edited(**values: Any) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        config = json.loads((head / "config.json").read_text())
        for key, value in values.items():
            if value is None:
                del config[key]
            else:
                config[key] = config[key] | value if isinstance(value, dict) and key in config else value
        (head / "config.json").write_text(json.dumps(config))

    return damage


def retensored(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Other tensors under a right checksum."""

    def damage(head: Path) -> None:
        import hashlib

        tensors = load_file(head / "head.safetensors")
        tensors.pop(name, None)
        save_file(tensors if value is None else {**tensors, name: value}, head / "head.safetensors")
        edited(tensors_sha256=hashlib.sha256((head / "head.safetensors").read_bytes()).hexdigest())(head)

    return damage


HEADS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (lambda head: (head / "head.safetensors").unlink(), "head.safetensors"),
    "no configuration": (lambda head: (head / "config.json").unlink(), "config.json"),
    "truncated tensors": (lambda h: os.truncate(h / "head.safetensors", 100), "head.safetensors"),
    "configuration not JSON": (lambda h: h.joinpath("config.json").write_text("{method") and None, "config.json"),
    "configuration a list": (lambda h: h.joinpath("config.json").write_text("[]") and None, "config.json"),
    "newer schema": (edited(schema=99), "schema 99"),
    "key missing": (edited(method=None), "method is missing"),
    "key unknown": (edited(colour="red"), "colour"),
    "wrong type": (edited(class_names="apple"), "class_names"),
    "unknown method": (edited(method="cooop"), "cooop"),
    "unknown setting": (edited(settings={"lenght": 4}), "lenght"),
    "setting of another type": (edited(settings={"context_length": "four"}), "context_length"),
    "no class names": (edited(class_names=[], all_class_names=[]), "class_names is empty"),
    "class name no text": (edited(class_names=["a", 3], all_class_names=["a", 3]), "class_names[1] is 3"),
    "other weights": (edited(backbone={"fingerprint": "0" * 64}), "fingerprint"),
    "unknown backbone": (edited(backbone={"name": "ViT-B-61"}), "ViT-B-61"),
    "tensor missing": (retensored("learnable.prompt.ctx", None), "prompt.ctx: missing"),
    "tensor of another shape": (retensored("learnable.prompt.ctx", torch.zeros(3, 192)), "prompt.ctx: shape [3, 192]"),
    "tensor unknown": (retensored("learnable.extra", torch.zeros(1)), "extra"),
}
for _name, (_damage, _culprit) in HEADS.items():
    case(f"head: {_name}", _culprit)(with_head(_damage))


# -- command lines ----------------------------------------------------------------------------------------------------
COMMANDS: dict[str, tuple[list[str], str]] = {
    "unknown command": (["trian"], "train"),
    "no configuration": (["train"], "--config"),
    "missing file": (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "value missing": (["train", "--config", "coop/demo", "--data.shots"], "--data.shots"),
    "unknown option": (["train", "--config", "coop/demo", "--data.shotz", "4"], "data.shots"),
    "word left over": (["train", "--config", "coop/demo", "fast"], "fast"),
    "said twice": (["train", "--config", "coop/demo", "--seed", "1", "--seed", "2"], "seed"),
    "unknown data set": (["train", "--config", "coop/demo", "--data.name", "caltech100"], "caltech101"),
    "unknown backbone": (["train", "--config", "coop/demo", "--backbone.name", "ViT-B-61"], "ViT-B-61"),
    "unknown weights": (["train", "--config", "coop/dtd", "--backbone.pretrained", "openia"], "openia"),
    "no weights": (["train", "--config", "coop/dtd", "--backbone.pretrained", "null"], "random"),
    "batch that does not divide": (["train", "--config", "coop/demo", "--trainer.devices", "3"], "trainer.devices"),
    "bad seeds": (["base-to-new", "--config", "coop/demo", "--seeds", "1,x"], "x"),
    "no run": (["predict", "runs/none", "x.png"], "runs/none"),
    "bad list": (["list", "metods"], "methods"),
}
for _name, (_words, _culprit) in COMMANDS.items():
    case(f"command: {_name}", _culprit)(lambda _, words=_words: list(words))


#: What a run folder says about the inputs of the run.
INPUTS = {"config.yaml", "env.json", "images.json", "split.json"}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_input_ends_in_one_screen_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, culprit = CASES[name]
    words = prepare(tmp_path)
    before = files_in(tmp_path)
    text = screen(capsys, words)
    assert culprit in text
    assert "Traceback" not in text and len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) <= 400
    # A run that could not end may be resumed: its inputs stay, but nothing half-written, no head, no results.
    left = {path for path in files_in(tmp_path) - before if not path.startswith("cache/")}
    assert {Path(path).name for path in left if not path.endswith(".lock")} <= INPUTS


def test_there_are_sixty_and_more_of_every_kind() -> None:
    kinds = [name.split(":")[0] for name in CASES]
    assert len(kinds) >= 60
    least = {"config": 12, "split": 12, "image": 8, "class name": 6, "head": 12, "command": 12}
    assert {kind: kinds.count(kind) >= count for kind, count in least.items()} == dict.fromkeys(least, True)


@pytest.mark.parametrize("name", ["config: unknown method", "split: two names", "head: truncated tensors"])
def test_a_process_of_its_own_ends_the_same(name: str, tmp_path: Path) -> None:
    prepare, culprit = CASES[name]
    command = [sys.executable, "-m", "vlprompt", *prepare(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert culprit in done.stderr and "Traceback" not in done.stderr
