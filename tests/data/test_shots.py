"""The few-shot draw and the base/new cut against the published selections."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprompt.data import FileSource, Sample, SplitLists, class_labels, fewshot, keep_labels
from vlprompt.data.records import lines_sha256
from vlprompt.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fewshot_caltech101.json").read_text())


def samples(part: str) -> list[Sample]:
    """The compact form back to samples: folder, name, and image numbers in file order."""
    column = GOLDEN["class_fields"].index({"train": "train image numbers"}.get(part, part))
    return [
        Sample(f"{row[0]}/image_{number:04d}.jpg", label, FileSource(""))
        for label, row in enumerate(GOLDEN["classes"])
        for number in row[column]
    ]


CALTECH = SplitLists([row[1] for row in GOLDEN["classes"]], samples("train"), samples("val"), samples("test"))


def ids_hash(part: list[Sample]) -> str:
    return lines_sha256(sample.id for sample in part)


def test_the_compact_split_is_the_published_one() -> None:
    assert CALTECH.content_sha256() == GOLDEN["split_content_sha256"]
    assert CALTECH.class_names[:5] == ["face", "leopard", "motorbike", "accordion", "airplane"]


@pytest.mark.parametrize("row", sorted(GOLDEN["rows"]))
def test_caltech_rows(row: str) -> None:
    expected: dict[str, Any] = GOLDEN["rows"][row]
    seed, shots = (int("".join(c for c in word if c.isdigit())) for word in row.split("_"))
    random.seed(12345)
    train, val = fewshot(CALTECH.train, CALTECH.val, shots, seed)
    assert ids_hash(train) == expected["sha256"]["train"]
    assert ids_hash(val) == expected["sha256"]["val"]
    assert [len(train), len(val), len(CALTECH.test)] == expected["counts"]["all"]
    for classes in ("base", "new"):
        labels = class_labels([sample.label for sample in train], classes)
        parts = [keep_labels(part, labels) for part in (train, val, CALTECH.test)]
        assert [len(part) for part in parts] == expected["counts"][classes]
        assert len(labels) == expected["counts"]["classes"][classes]
        assert ids_hash(parts[0]) == expected["sha256"][f"{classes}_train"]
        assert ids_hash(parts[1]) == expected["sha256"][f"{classes}_val"]
        assert {sample.label for sample in parts[0]} == set(range(len(labels)))


def listed(labels: list[int]) -> list[Sample]:
    return [Sample(str(index), label, FileSource("")) for index, label in enumerate(labels)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_draw_properties(labels: list[int], shots: int, seed: int) -> None:
    everything = listed(labels)
    state = random.getstate()
    train, val = fewshot(everything, everything, shots, seed)
    assert random.getstate() == state
    random.random()
    assert fewshot(everything, everything, shots, seed) == (train, val)
    first_seen = list(dict.fromkeys(labels))
    assert [sample.label for sample in train] == [
        label for label in first_seen for _ in range(min(shots, labels.count(label)))
    ]
    assert len({sample.id for sample in train}) == len(train)
    for label in first_seen:
        assert sum(sample.label == label for sample in val) == min(shots, 4, labels.count(label))
        if labels.count(label) < shots:  # short classes give all, in file order
            mine = [sample.id for sample in train if sample.label == label]
            assert mine == [sample.id for sample in everything if sample.label == label]


@given(st.sets(st.integers(0, 40), min_size=2))
def test_base_and_new_are_the_two_halves(labels: set[int]) -> None:
    base, new = class_labels(list(labels), "base"), class_labels(list(labels), "new")
    assert base + new == sorted(labels) == class_labels(list(labels), "all")
    assert len(base) - len(new) in (0, 1)


def test_complete_lists_and_untouched_validation() -> None:
    everything = listed([0, 0, 1, 1, 1])
    assert fewshot(everything, everything, -1, 3) == (everything, everything)
    train, val = fewshot(everything, everything, 1, 3, sample_val=False)
    assert len(train) == 2 and val == everything


def test_seed_zero_is_a_seed() -> None:
    everything = listed([0] * 50)
    assert fewshot(everything, [], 5, 0) == fewshot(everything, [], 5, 0) != fewshot(everything, [], 5, 1)


@pytest.mark.parametrize(
    ("shots", "seed", "word"),
    [(0, 1, "shots"), (-2, 1, "shots"), (True, 1, "shots"), (1, -1, "seed"), (1, None, "seed"), (1.0, 1, "shots")],
)
def test_refused_draws(shots: Any, seed: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word} is .*accepted"):
        fewshot(listed([0]), [], shots, seed)


def test_one_class_has_no_new_half() -> None:
    assert class_labels([3, 3], "base") == [3]
    with pytest.raises(ConfigError, match="cannot be cut"):
        class_labels([3, 3], "new")
    with pytest.raises(ConfigError, match="'novel'.*all, base, new"):
        class_labels([3, 4], "novel")
