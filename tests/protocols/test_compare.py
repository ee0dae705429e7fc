"""What differs between two runs, in words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.protocols.compare import compare, compare_results
from vlprompt.runs.run import run

Tiny = Callable[..., RunConfig]


@pytest.fixture
def results(tiny: Tiny) -> dict[str, Any]:
    return run(tiny("coop")).results


def changed(results: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    other = copy.deepcopy(results)
    *sections, name = key.split(".")
    where = other
    for section in sections:
        where = where.setdefault(section, {})
    where[name] = value
    return other


def test_a_run_records_what_explains_it(results: dict[str, Any]) -> None:
    data = results["data"]
    assert {
        *("card_sha256", "reader", "split", "split_sha256", "class_names_sha256", "template", "protocol", "classes"),
        *("sampler", "seed", "shots", "shots_sha256", "val_sha256", "train", "val", "test", "metric"),
    } <= data.keys()
    assert data["transform"]["train"] == data["transform"]["test"] and "center crop" in data["transform"]["test"]
    assert {"vlprompt", "torch", "torchvision", "pillow", "python"} <= results["versions"].keys()


def test_two_methods_on_the_same_data(tiny: Tiny) -> None:
    first, second = run(tiny("coop")), run(tiny("mocoop", epochs=3))
    found = compare(first.folder, second.folder / "results.json")
    assert found.same_data and found.text().startswith(
        "the data protocol is the same\nalso different:\n  - method: 'coop'"
    )
    assert any(line == "recipe: epochs 2 against 3" for line in found.other)
    assert compare(first.folder, first.folder).text() == "the data protocol is the same"


def test_another_draw_is_another_protocol(tiny: Tiny) -> None:
    found = compare(run(tiny("coop")).folder, run(tiny("coop", seed=2, transform="random")).folder)
    assert not found.same_data
    assert [line.partition(":")[0] for line in found.data] == ["seed", "training images", "training transform"]
    assert "seed: 1 against 2" in found.data and "random resized crop" in found.text()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.split_sha256", "0" * 64, "content of the split file: "),
        ("data.class_names_sha256", "0" * 64, "class names or their order: "),
        ("data.template", "a {}.", "template: 'an emoji of a {}.' against 'a {}.'"),
        ("data.sampler", "clip-lora", "few-shot sampler: "),
        ("data.val_sha256", "0" * 64, "validation images: "),
        ("data.transform.test", "squash", "test transform: "),
        ("data.source", ["a"], "domains to train on: nothing against ['a']"),
        ("selection", {"on": "test", "oracle": True}, "chosen by an oracle in the second run alone"),
    ],
)
def test_each_part_of_the_data_protocol_is_named(key: str, value: Any, words: str, results: dict[str, Any]) -> None:
    if key == "data.template":
        results = changed(results, key, "an emoji of a {}.")
    found = compare_results(results, changed(results, key, value))
    assert len(found.data) == 1 and words in found.data[0]
    assert "000000000000..." in found.data[0] or value != "0" * 64


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("backbone.fingerprint", "0" * 64, "content of the weights: "),
        ("versions.torch", "1.0", "version of torch: "),
        ("versions.another", "1.0", "version of another: nothing against '1.0'"),
        ("selection", {"on": "val", "oracle": False}, "hyperparameters were chosen on: nothing against 'val'"),
    ],
)
def test_what_is_no_part_of_it_is_told_too(key: str, value: Any, words: str, results: dict[str, Any]) -> None:
    found = compare_results(results, changed(results, key, value))
    assert found.same_data and len(found.other) == 1 and words in found.other[0]


def test_what_neither_records_is_not_called_equal(results: dict[str, Any]) -> None:
    old = copy.deepcopy(results)
    del old["data"]["transform"], old["versions"]
    found = compare_results(old, old)
    assert [line.partition(":")[0] for line in found.data] == ["training transform", "test transform"]
    assert "neither run records it; run them again with --force" in found.data[0]


def test_what_is_no_run(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results.json; give the folder of a finished run, or that file"):
        compare(tmp_path, tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"data": 3}))
    with pytest.raises(ConfigError, match="is no results file of a run: .*backbone is missing or of a wrong type"):
        compare(tmp_path / "other.json", tmp_path)
