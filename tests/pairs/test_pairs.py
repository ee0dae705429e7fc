"""Image-caption data sets: lists of pairs as untrusted input."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vlprompt.datasets import catalogue
from vlprompt.datasets.card import Card, Classes, Templates
from vlprompt.datasets.options import PairsOptions
from vlprompt.errors import DataError
from vlprompt.pairs import load_pairs


@pytest.fixture
def pairs_root(tmp_path, monkeypatch):
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "pairs" / "images" / f"{name}.png")
    options = PairsOptions("pairs.jsonl", "images")
    card = Card("mine", "pairs", options, Classes(), Templates("{}"), folders=("pairs",))
    monkeypatch.setattr(catalogue, "all_cards", lambda: {"mine": card})
    return tmp_path


def write(root, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "pairs" / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_pairs_in_file_order(pairs_root):
    write(pairs_root, {"image": "two.png", "caption": "a two"}, {"image": "one.png", "caption": "a one"})
    pairs = load_pairs("mine", root=pairs_root)
    assert [(pair.id, pair.caption, pair.domain) for pair in pairs] == [
        ("two.png", "a two", ""),
        ("one.png", "a one", ""),
    ]
    assert pairs[0].source.open().getpixel((0, 0)) == (255, 0, 0)


def test_all_bad_lines_are_listed_at_once(pairs_root):
    rows = [
        "not json",
        {"image": "one.png"},
        {"image": "../one.png", "caption": "x"},
        {"image": "one.png", "caption": " "},
        {"image": "one.png", "caption": 3},
        {"image": 7, "caption": "x"},
        "[" * 100_000,
    ]
    write(pairs_root, *rows)
    with pytest.raises(DataError) as caught:
        load_pairs("mine", root=pairs_root)
    assert all(f"line {number}:" in str(caught.value) for number in range(1, 8))
    assert "leaves the image folder" in str(caught.value) and "Traceback" not in str(caught.value)


def test_missing_files_are_named(pairs_root):
    with pytest.raises(DataError, match="pairs.jsonl .does not exist."):
        load_pairs("mine", root=pairs_root)
    write(pairs_root, {"image": "three.png", "caption": "x"})
    with pytest.raises(DataError, match="1 of 1 images of mine are missing"):
        load_pairs("mine", root=pairs_root)
    write(pairs_root, "")
    with pytest.raises(DataError, match="line 1|no lines"):
        load_pairs("mine", root=pairs_root)
