"""The packaged benchmarks: complete, disjoint where required, readable without a network."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import vlprompt
from vlprompt.datasets import load_dataset
from vlprompt.datasets.card import ASSETS
from vlprompt.datasets.catalogue import find_card
from vlprompt.datasets.readers import read_dataset
from vlprompt.errors import ConfigError
from vlprompt.pairs import load_pairs

FOLDER = ASSETS / "demo"
DRAWS = ("demo", "demo-2", "demo-3")
FLUENT = {"fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast"}
NAMES = {row["name"]: row for row in json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))}


def styles(samples):
    return {sample.id.split("/")[0] for sample in samples}


def drawings(samples):
    return {sample.id.partition("#")[0] for sample in samples}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_has_seen_and_novel_names_in_both_halves(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_dataset(name, classes="base", shots=16)
    assert (len(task.class_names), len(task.train), len(task.test)) == (50, 800, 450)
    assert Counter(sample.label for sample in task.test) == dict.fromkeys(range(50), 9)
    assert task.describe()["split_published"] is True
    other = task.counterpart()
    assert other.classes == "new" and task.class_names + other.class_names == task.all_class_names
    for half in (task, other):
        assert sum(NAMES[name]["novel"] for name in half.class_names) == 25
    assert not set(task.class_names) & set(other.class_names)
    json.dumps(task.describe())


@pytest.mark.parametrize("name", DRAWS)
def test_splits_are_by_different_designers(name):
    task = load_dataset(name, shots=-1)
    assert styles(task.train) == {"openmoji", "emojione-v1"} and styles(task.test) == FLUENT
    assert styles(task.val) == {"streamline-emojis"}
    # Every class has training images in both designs, and test images in all three.
    for samples, count in ((task.train, 2), (task.test, 3)):
        assert set(Counter(label for _, label in {(s.id.split("/")[0], s.label) for s in samples}).values()) == {count}


def test_draws_differ():
    names = [set(load_dataset(name).class_names) for name in DRAWS]
    assert all(len(a & b) < 50 for a in names for b in names if a is not b)


@pytest.mark.parametrize("name", [*DRAWS, "demo-kinds", "demo-styles"])
def test_splits_share_no_drawing(name):
    lists = read_dataset(find_card(name))
    train, val, test = drawings(lists.train), drawings(lists.val), drawings(lists.test)
    assert not train & val and not train & test and not val & test


def test_kinds_are_tested_on_other_names():
    lists = read_dataset(find_card("demo-kinds"))
    assert len(lists.class_names) == 36 and {"bird", "fruit", "worried face"} <= set(lists.class_names)
    codes = [{sample.id.split("/")[1] for sample in samples} for samples in (lists.train, lists.val, lists.test)]
    assert not codes[0] & codes[1] and not codes[0] & codes[2] and not codes[1] & codes[2]
    kind_of = {f"{row['key']}.webp": row["kind"] for row in NAMES.values()}
    assert all(kind_of[s.id.split("/")[1]] == lists.class_names[s.label] for s in lists.test)


def test_styles_are_domains_with_corrupted_versions():
    card = find_card("demo-styles")
    lists, kinds = read_dataset(card), read_dataset(find_card("demo-kinds"))
    clean = list(card.domains)
    assert {sample.domain for sample in lists.train} == set(clean) and len(clean) == 6
    counts = Counter(sample.domain for sample in lists.test)
    assert set(counts) == {f"{domain}{version}" for domain in clean for version in ("", "+noise", "+blur")}
    assert all(counts[domain] == counts[f"{domain}+noise"] == counts[f"{domain}+blur"] for domain in clean)
    assert [s.id for s in lists.test if "#" not in s.id] == [s.id for s in kinds.test]


def test_pairs_hold_no_benchmark_name():
    pairs = load_pairs()
    assert len(pairs) == 1200 and Counter(pair.domain for pair in pairs) == dict.fromkeys(
        ("noto", "twemoji", "emojione", "fxemoji"), 300
    )
    taken = {name for draw in DRAWS for name in load_dataset(draw).class_names}
    novel = {name for name, row in NAMES.items() if row["novel"]}
    assert not {pair.caption.split(", ")[0] for pair in pairs} & (taken | novel)
    assert pairs[0].source.open().size == (64, 64)


def test_pairs_in_unseen_styles_hold_no_benchmark_name_and_no_test_style():
    pairs = load_pairs("demo-pairs-unseen")
    assert len(pairs) == 2436 and len({pair.caption for pair in pairs}) == 1327
    taken = {name for draw in DRAWS for name in load_dataset(draw).class_names}
    assert not {pair.caption for pair in pairs} & taken
    assert not any(NAMES[pair.caption]["novel"] for pair in pairs)
    tests = {sample.id.partition("/")[0] for draw in DRAWS for sample in load_dataset(draw).test}
    styles = {pair.domain for pair in pairs}
    assert styles == {"openmoji", "emojione-v1", "streamline-emojis"} and not styles & tests
    assert pairs[0].source.open().size == (64, 64)


def test_pairs_and_classes_are_not_confused():
    with pytest.raises(ConfigError, match="has captions, not classes: use vlprompt.load_pairs"):
        load_dataset("demo-pairs")
    with pytest.raises(ConfigError, match="'demo-kinds' has classes, not captions.*demo-pairs"):
        vlprompt.load_pairs("demo-kinds")


def test_every_archive_has_its_licence_and_opens():
    text = (FOLDER / "LICENCES.md").read_text(encoding="utf-8")
    archives = sorted(FOLDER.glob("*.zip"))
    assert len(archives) == 10
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            licence = file.read("LICENCE.txt").decode()
            assert file.testzip() is None
        [line] = [line for line in text.splitlines() if line.startswith(f"- `{archive.stem}`: ")][:1]
        assert line.rsplit(". ", 1)[1] in licence and Path(archive).stat().st_size > 100_000


@pytest.mark.parametrize("name", ["openmoji", "fluent-emoji", "streamline-emojis"])
def test_images_decode(name):
    task = load_dataset("demo-styles", shots=1)
    for sample in [s for s in task.test if s.domain.split("+")[0] == name][:9]:
        assert sample.source.open().size == (64, 64) and sample.source.open().mode == "RGB"
