"""Damaged and foreign heads, each passed to ``vlprompt predict``: refused with a short text that names the problem."""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # noqa: TID251 - to see that such files are refused, and never read
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlprompt
from vlprompt.cli.main import main
from vlprompt.io import Head

Damage = Callable[[Path], Any]


class Trap:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


@pytest.fixture(scope="module")
def good_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), ["apple", "bell"], context_length=2)
    return Head(method).save_pretrained(tmp_path_factory.mktemp("good") / "head")


def edited(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(head: Path) -> None:
        config = json.loads((head / "config.json").read_text())
        change(config)
        (head / "config.json").write_text(json.dumps(config))

    return damage


def retensored(write: Callable[[Path, dict[str, torch.Tensor]], Any]) -> Damage:
    """Return a damage that writes other tensors and updates the checksum."""

    def damage(head: Path) -> None:
        place = head / "head.safetensors"
        write(place, load_file(place))
        config = json.loads((head / "config.json").read_text())
        config["tensors_sha256"] = hashlib.sha256(place.read_bytes()).hexdigest()
        (head / "config.json").write_text(json.dumps(config))

    return damage


def saved(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return retensored(lambda place, tensors: save_file(change(tensors), place))


def flip(place: Path) -> None:
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)


def as_folder(name: str) -> Callable[[Path], None]:
    def change(head: Path) -> None:
        (head / name).unlink()
        (head / name).mkdir()

    return change


HEADS: dict[str, tuple[Damage, str]] = {
    "one bit of a tensor": ((lambda h: flip(h / "head.safetensors")), "head.safetensors is damaged"),
    "empty tensors": ((lambda h: (h / "head.safetensors").write_bytes(b"")), "head.safetensors is damaged"),
    "tensors are a directory": ((as_folder("head.safetensors")), "head.safetensors"),
    "configuration is a directory": ((as_folder("config.json")), "config.json"),
    "configuration empty": ((lambda h: (h / "config.json").write_text("")), "config.json is not readable"),
    "configuration not UTF-8": ((lambda h: (h / "config.json").write_bytes(b'{"\xff": 1}')), "config.json"),
    "configuration nested too deeply": ((lambda h: (h / "config.json").write_text("[" * 99999)), "config.json"),
    "configuration too large": ((lambda h: os.truncate(h / "config.json", 17 << 20)), "at most 16,777,216 are read"),
    "schema zero": (edited(lambda c: c.update(schema=0)), "schema 0"),
    "schema true": (edited(lambda c: c.update(schema=True)), "schema is True"),
    "schema as a text": (edited(lambda c: c.update(schema="1")), "schema is '1'"),
    "everything missing": (edited(lambda c: c.clear()), "tensors_sha256 is missing"),
    "a backbone without a fingerprint": (edited(lambda c: c["backbone"].pop("fingerprint")), "backbone.fingerprint"),
    "other preprocessing": (edited(lambda c: c["preprocess"].update(size=224)), "preprocess.size: 224 in the head, 64"),
    "preprocessing missing": (edited(lambda c: c["preprocess"].clear()), "preprocess.mean"),
    "another width": (edited(lambda c: c["backbone"].update(embed_dim=512)), "embed_dim: 512 in the head, 192 given"),
    "another precision": (edited(lambda c: c["backbone"].update(precision="bf16")), "another backbone"),
    "unknown precision": (edited(lambda c: c["backbone"].update(precision="fp8")), "fp8"),
    "a backbone in a missing folder": (
        edited(lambda c: c["backbone"].update(name="local-dir:gone", pretrained="x.bin")), "local-dir:gone"
    ),
    "setting with the name of an argument": (edited(lambda c: c["settings"].update(class_names=["x"])), "class_names"),
    "setting out of range": (edited(lambda c: c["settings"].update(context_length=0)), "context_length is 0"),
    "settings of another method": (edited(lambda c: c.update(method="zeroshot")), "zeroshot"),
    "more classes than tensors": (
        edited(lambda c: c.update(class_names=["apple", "bell", "cup"], all_class_names=["apple", "bell", "cup"])),
        "class_weights: shape [2, 192], expected [3, 192]",
    ),
    "all classes in another order": (edited(lambda c: c["all_class_names"].reverse()), "all_class_names must begin"),
    "a class name of blanks": (
        edited(lambda c: c.update(class_names=["apple", "  "], all_class_names=["apple", "  "])), "class 1: '  '"
    ),
    "a class name that is too long": (
        edited(lambda c: c.update(class_names=["1234567890" * 9] * 2, all_class_names=["1234567890" * 9] * 2)),
        "12345678901234567890",
    ),
    "pickle as tensors": (retensored(lambda p, t: p.write_bytes(pickle.dumps(Trap()))), "is not a safetensors file"),
    "header of impossible length": (
        retensored(lambda p, t: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")), "is not a safetensors file"
    ),
    "class weights of zeros": (
        saved(lambda t: {**t, "class_weights": torch.zeros_like(t["class_weights"])}),
        "class_weights: 2 of 2 rows are not those of the learned tensors",
    ),
    "class weights in another order": (
        saved(lambda t: {**t, "class_weights": t["class_weights"].flip(0)}),
        "rows are not those of the learned tensors",
    ),
    "tensors that are not finite": (
        saved(lambda t: {**t, "learnable.prompt.ctx": t["learnable.prompt.ctx"] * torch.nan}), "not finite"
    ),
    "tensors of whole numbers": (saved(lambda t: {k: v.long() for k, v in t.items()}), "torch.int64"),
    "no class weights": (
        saved(lambda t: {k: v for k, v in t.items() if k != "class_weights"}), "class_weights: missing"
    ),
    "an unknown tensor": (saved(lambda t: {**t, "extra": torch.zeros(1)}), "extra: unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_damaged_head_is_refused_by_name(
    name: str, good_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good_head, "head")
    Image.new("RGB", (40, 40)).save("x.png")
    damage, problem = HEADS[name]
    damage(Path("head"))
    before = set(tmp_path.rglob("*"))
    assert main(["predict", "head", "x.png"]) == 2
    out, text = capsys.readouterr()
    assert problem in text and "head" in text and out == ""
    assert "Traceback" not in text
    assert sum(max(1, -(-len(line) // 100)) for line in text.splitlines()) <= 24  # rows of a terminal
    assert set(tmp_path.rglob("*")) == before
