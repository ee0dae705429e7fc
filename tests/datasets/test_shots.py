"""Few-shot draws and the base/new cut against the published selections."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprompt._files import sha256_lines
from vlprompt.datasets import FileSource, Sample, SplitLists, class_labels, fewshot, keep_labels, load_dataset
from vlprompt.datasets.shots import SAMPLERS, validation_rule
from vlprompt.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fewshot_caltech101.json").read_text())


def samples(split: str) -> list[Sample]:
    """Samples from the compact form: folder, name, and image numbers in file order."""
    column = GOLDEN["class_fields"].index({"train": "train image numbers"}.get(split, split))
    return [
        Sample(f"{row[0]}/image_{number:04d}.jpg", label, FileSource(""))
        for label, row in enumerate(GOLDEN["classes"])
        for number in row[column]
    ]


CALTECH = SplitLists([row[1] for row in GOLDEN["classes"]], samples("train"), samples("val"), samples("test"))


def ids_hash(drawn: list[Sample]) -> str:
    return sha256_lines(sample.id for sample in drawn)


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
        kept = [keep_labels(drawn, labels) for drawn in (train, val, CALTECH.test)]
        assert [len(drawn) for drawn in kept] == expected["counts"][classes]
        assert len(labels) == expected["counts"]["classes"][classes]
        assert ids_hash(kept[0]) == expected["sha256"][f"{classes}_train"]
        assert ids_hash(kept[1]) == expected["sha256"][f"{classes}_val"]
        assert {sample.label for sample in kept[0]} == set(range(len(labels)))


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
        if labels.count(label) < shots:  # a class with too few images gives all, in file order
            members = [sample.id for sample in train if sample.label == label]
            assert members == [sample.id for sample in everything if sample.label == label]


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


SAMPLED = json.loads((Path(__file__).parents[1] / "golden" / "samplers_caltech101.json").read_text())


@pytest.mark.parametrize("row", sorted(set(SAMPLED) - {"about"}))
def test_the_other_families_samplers(row: str) -> None:
    name, _, seed, _, shots = row.split()
    expected = SAMPLED[row]
    train, val = fewshot(CALTECH.train, CALTECH.val, int(shots), int(seed), sampler=name)
    assert ids_hash(train) == expected["train"]
    assert ids_hash(val) == expected.get("val", ids_hash(CALTECH.val))
    if "overlap_with_coop" in expected:
        coop, _ = fewshot(CALTECH.train, CALTECH.val, int(shots), int(seed))
        assert len({s.id for s in coop} & {s.id for s in train}) == expected["overlap_with_coop"]


def test_clip_lora_draws_the_published_overlap() -> None:
    """Seed 1 shares 6 of 100, 68 of 400 and 902 of 1,600 images with CoOp's draw."""
    overlaps = [SAMPLED[f"clip-lora-v1 seed 1 shots {shots}"]["overlap_with_coop"] for shots in (1, 4, 16)]
    assert overlaps == [6, 68, 902]


def test_samplers_on_short_classes() -> None:
    few = [Sample(f"{label}/{n}", label, FileSource("")) for label in (1, 0) for n in range(3)]
    filled, _ = fewshot(few, [], 5, 1, sampler="clip-lora-v1")
    assert [s.label for s in filled] == [1] * 5 + [0] * 5 and len(set(filled)) < 10
    assert len(fewshot(few, [], 5, 1)[0]) == 6
    with pytest.raises(ConfigError, match="tpt-v1 needs as many"):
        fewshot(few, [], 5, 1, sampler="tpt-v1")
    with pytest.raises(ConfigError, match="clip-lora-v1 needs 4 training images"):
        fewshot(few, few[:1], 2, 1, sampler="clip-lora-v1", sample_val=False)
    train, val = fewshot(few, few[:1], 1, 1, sampler="clip-lora-v1", sample_val=False)
    assert [s.label for s in train] == [0, 1] == [s.label for s in val] and not set(train) & set(val)


def numpy_draw(samples: list[Sample], shots: int, state: Any) -> list[Sample]:
    """The draw of CoOp's lpclip/linear_probe.py in NumPy's words."""
    labels = np.array([sample.label for sample in samples])
    rows = [state.choice(np.where(labels == label)[0], shots, replace=False) for label in np.unique(labels)]
    return [samples[row] for row in np.concatenate(rows)]


@pytest.mark.parametrize("seed", [0, 1, 10, 2**32 - 1])
@pytest.mark.parametrize("shots", [1, 8, 16])
def test_the_linear_probe_s_draws_are_numpy_s(shots: int, seed: int) -> None:
    state = np.random.RandomState(seed)  # noqa: NPY002
    expected = numpy_draw(CALTECH.train, shots, state), numpy_draw(CALTECH.val, min(shots, 4), state)
    assert fewshot(CALTECH.train, CALTECH.val, shots, seed, sampler="lpclip-v1") == expected


def test_the_linear_probe_s_short_classes_are_complete() -> None:
    few = listed([1, 0, 1, 0, 1])
    train, val = fewshot(few, few[:1], 3, 1, sampler="lpclip-v1")
    assert [s.label for s in train] == [0, 0, 1, 1, 1] and len(set(train)) == 5 and val == few[:1]


def test_lp_plus_plus_draws_as_many_validation_images_as_shots() -> None:
    train, val = fewshot(CALTECH.train, CALTECH.val, 8, 3, sampler="lp-plus-plus-v1")
    coop, _ = fewshot(CALTECH.train, CALTECH.val, 8, 3)
    assert train == coop  # both begin with the training list, and no class is short
    assert [s.label for s in val] == [label for label in dict.fromkeys(s.label for s in CALTECH.val) for _ in range(8)]
    generator = random.Random(3)
    for samples, drawn in ((CALTECH.train, train), (CALTECH.val, val)):
        for label in dict.fromkeys(s.label for s in samples):
            members = [s for s in samples if s.label == label]
            own = generator.sample(members, 8) if len(members) >= 8 else generator.choices(members, k=8)
            assert [s for s in drawn if s.label == label] == own
    # On ImageNet one draw of 2 K training images is cut in two.
    many = listed([n % 3 for n in range(60)])
    train, val = fewshot(many, many[:5], 4, 1, sampler="lp-plus-plus-v1", sample_val=False)
    generator = random.Random(1)
    both = [generator.sample([s for s in many if s.label == label], 8) for label in range(3)]
    assert train == [s for drawn in both for s in drawn[:4]] and val == [s for drawn in both for s in drawn[4:]]
    with pytest.raises(ConfigError, match="lp-plus-plus-v1 needs 42 training images"):
        fewshot(many, [], 21, 1, sampler="lp-plus-plus-v1", sample_val=False)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sample_val", [True, False])
@pytest.mark.parametrize("shots", [-1, 2, 6])
def test_the_rule_of_the_validation_images_is_what_is_drawn(sampler: str, sample_val: bool, shots: int) -> None:
    train, val = ([Sample(f"{part}{n}", n % 3, FileSource("")) for n in range(60)] for part in ("t", "v"))
    drawn = fewshot(train, val, shots, 1, sampler=sampler, sample_val=sample_val)[1]
    rule = validation_rule(sampler, shots, sample_val=sample_val)
    counts = {
        "the whole list": 60,
        "at most 4 a class": 3 * min(shots, 4),
        "as many a class as there are shots": 3 * shots,
        "a fifth of the drawn images": 3 * -(-shots // 5),
    }
    assert len(drawn) == counts[rule]
    assert (drawn == val) == (rule == "the whole list")


def test_results_say_which_validation_images_there_were() -> None:
    assert load_dataset("demo").describe()["validation"] == "at most 4 a class"
    whole = load_dataset("demo", sampler="tip-v1").half("base")
    assert whole.describe()["validation"] == "the whole list"
    assert whole.val == load_dataset("demo", shots=-1).half("base").val


def test_unknown_samplers() -> None:
    with pytest.raises(ConfigError, match="data.sampler is 'dassl'. Did you mean 'dassl-v1'"):
        fewshot(CALTECH.train, [], 1, 1, sampler="dassl")


def test_images_with_several_labels() -> None:
    generator = random.Random(0)
    many = [
        Sample(str(n), tuple(sorted(generator.sample(range(6), generator.randrange(4)))), FileSource(""))
        for n in range(200)
    ]
    with pytest.raises(ConfigError, match="several labels need elevater-v1"):
        fewshot(many, [], 4, 1)
    train, val = fewshot(many, [], 5, 1, sampler="elevater-v1")
    assert not {s.id for s in train} & {s.id for s in val}
    counts = [sum(label in s.label for s in [*train, *val]) for label in range(6)]  # type: ignore[operator]
    assert min(counts) >= 5
    assert all(any(label in s.label for s in val) for label in range(6))  # type: ignore[operator]
    kept = keep_labels(many, [4, 5])
    assert {label for s in kept for label in s.label} == {0, 1} and all(s.label for s in kept)  # type: ignore[union-attr]


def interpreters() -> list[str]:
    """This Python and other installed versions that vlprompt supports."""
    paths = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in range(10, 15))]
    paths += [str(path) for path in sorted(Path("~/.pyenv/versions").expanduser().glob("3.1[0-9]*/bin/python"))]
    # pyenv has shims for versions that do not start.
    return [
        path
        for path in dict.fromkeys(paths)
        if path and not subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode
    ]


DRAWN_BY_ALL = "2c2eb86d2839db5ea33dd19dd2109f782c378acd89801529f432074db8a8d434"


def test_the_draw_is_the_same_in_other_pythons() -> None:
    """The draw needs no packages, so every installed Python can run it."""
    code = """
import json, random, sys
from vlprompt.datasets.records import Sample
from vlprompt._files import sha256_lines
from vlprompt.datasets.shots import SAMPLERS, fewshot
train = [Sample(f"{label}/{number}", label, None) for label in range(30) for number in range(20)]
val = [Sample(f"{label}/v{number}", label, None) for label in range(30) for number in range(5)]
random.seed(99)
drawn = [fewshot(train, val, 16, 1, sampler=name) for name in sorted(SAMPLERS)]
print(sha256_lines(sample.id for lists in drawn for samples in lists for sample in samples))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    hashes = {}
    for python in interpreters():
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{python}: {done.stderr}"
        hashes[python] = done.stdout.strip()
    assert set(hashes.values()) == {DRAWN_BY_ALL}, hashes
