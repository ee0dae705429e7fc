"""Few-shot lists: writing, reading, and refused lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprompt.datasets import find_card, load_dataset
from vlprompt.datasets.shot_lists import import_published, read_shot_list, shot_list_text
from vlprompt.errors import ConfigError, DataError


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    task = load_dataset("demo", shots=2, seed=3)
    facts: dict[str, Any] = {"dataset": "demo", "split_sha256": task.split_sha256, "sampler": "dassl-v1"}
    path = tmp_path / "shots.jsonl"
    path.write_text(shot_list_text(task.train, task.val, shots=2, seed=3, **facts))
    return path


def test_a_list_reproduces_its_draw(exported: Path) -> None:
    drawn, listed = load_dataset("demo", shots=2, seed=3), load_dataset("demo", shots_file=exported)
    assert listed.train == drawn.train and listed.val == drawn.val
    assert (listed.shots, listed.seed, listed.sampler) == (2, 3, "dassl-v1")
    base = load_dataset("demo", shots_file=exported, classes="base")
    assert base.shots_sha256 == load_dataset("demo", shots=2, seed=3, classes="base").shots_sha256
    assert base.counterpart().train == load_dataset("demo", shots=2, seed=3, classes="new").train


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"label": 0', '"label": 1', "S18 the lines do not have the hash"),
        ('"vlprompt shots 1"', '"vlprompt shots 2"', "S18 the first line is not"),
        ('"sampler"', '"samplr"', "S18 the first line lacks 'sampler'"),
        ('"path": "', '"path": "../', r"S04 line 2: .* leaves the image folder"),
        ('"part": "train"', '"part": "test"', "S03 line 2: expected"),
        ('"dataset": "demo"', '"dataset": "demo-2"', "S18 it is of data set 'demo-2', not of 'demo'"),
        ('"split_sha256": "', '"split_sha256": "0', "S18 it was drawn from another split"),
    ],
)
def test_changed_lists_are_refused(old: str, new: str, match: str, exported: Path) -> None:
    changed(exported, old, new)
    with pytest.raises(DataError, match=match):
        load_dataset("demo", shots_file=exported)


def test_a_test_image_in_a_list_is_refused(tmp_path: Path) -> None:
    task = load_dataset("demo", shots=1, seed=1)
    facts: dict[str, Any] = {"dataset": "demo", "split_sha256": task.split_sha256, "sampler": "mine"}
    path = tmp_path / "shots.jsonl"
    path.write_text(shot_list_text([*task.train, task.test[0]], [], shots=1, seed=1, **facts))
    with pytest.raises(DataError, match=f"S18 train: {task.test[0].id} is a test image"):
        load_dataset("demo", shots_file=path)


def test_published_index_files_are_imported(tmp_path: Path) -> None:
    task = load_dataset("demo", shots=2, seed=1)
    items = {
        split: {
            "data": [
                {"impath": f"./data/demo/images/{s.id}", "label": s.label, "classname": task.class_names[int(s.label)]}  # type: ignore[arg-type]
                for s in samples
            ],
            "indices": [],
        }
        for split, samples in (("train", task.train), ("val", task.val))
    }
    path = tmp_path / "shot_2-seed_1.json"
    path.write_text(json.dumps(items))
    out = tmp_path / "list.jsonl"
    out.write_text(import_published(path, find_card("demo")))
    header = read_shot_list(out).header
    assert (header["shots"], header["seed"], header["sampler"]) == (2, 1, "imported")
    assert load_dataset("demo", shots_file=out).shots_sha256 == task.shots_sha256
    items["train"]["data"][0]["label"] += 1
    items["train"]["data"][1]["impath"] = "./data/demo/none.png"
    path.write_text(json.dumps(items))
    with pytest.raises(DataError, match="2 problems(.|\n)*has label(.|\n)*is not a training or validation image"):
        import_published(path, find_card("demo"))
    path.write_text("{}")
    with pytest.raises(DataError, match="S01 it cannot be read"):
        import_published(path, find_card("demo"))


@given(st.one_of(st.binary(max_size=80), st.text(max_size=60).map(str.encode)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_lists_give_our_error_only(exported: Path, tail: bytes) -> None:
    path = exported.with_name("other.jsonl")
    for content in (tail, exported.read_bytes().split(b"\n")[0] + b"\n" + tail):
        path.write_bytes(content)
        with pytest.raises((DataError, ConfigError)):
            load_dataset("demo", shots_file=path)
