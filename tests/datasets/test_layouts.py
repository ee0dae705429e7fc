"""Every card reads an invented mini data set in its own layout: issue 4, acceptance 3."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.datasets.layouts import write_layout
from tests.datasets.torchvision_files import TORCHVISION
from vlprompt.datasets.catalogue import card_class_names, find_card, list_datasets
from vlprompt.datasets.options import TorchvisionOptions
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.records import SPLITS, labels_of

# Packaged ones are read as they are in their own tests; `folder` has no layout of its own.
CARDS = [name for name in list_datasets() if not find_card(name).packaged and name != "folder"]
# A card whose splits have readers of their own is read in every one of them.
CASES = [(name, split) for name in CARDS for split in (find_card(name).splits or [None])]


@pytest.mark.parametrize(("name", "split"), CASES, ids=[f"{name}-{split}" for name, split in CASES])
def test_card_reads_its_layout(name: str, split: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    card = find_card(name).with_split(split)
    expected = write_layout(card, tmp_path, monkeypatch=monkeypatch)
    with warnings.catch_warnings():
        # Sizes and contents are not the published ones (S13, S14), and two ImageNet classes share a name (S10).
        warnings.simplefilter("ignore", UserWarning)
        lists = read_dataset(expected.card, tmp_path)

    assert {part: len(getattr(lists, part)) for part in SPLITS} == expected.counts
    assert sum(expected.counts.values()) > 0 and expected.counts["test"] > 0
    assert lists.class_names == expected.class_names == (card_class_names(card) or expected.class_names)
    assert len(lists.class_names) == card.classes.count
    for part in SPLITS:
        samples = getattr(lists, part)
        assert len({sample.id for sample in samples}) == len(samples)
        # Every class is there, under every number.
        seen = {label for sample in samples for label in labels_of(sample)}
        assert seen == (set(range(len(lists.class_names))) if samples else set())
        assert all(isinstance(sample.label, tuple) == card.multilabel for sample in samples)
    found = {sample.domain for part in SPLITS for sample in getattr(lists, part)}
    assert found == (expected.domains or {""})

    sample = lists.test[-1]
    picture = sample.source.open()
    assert picture.mode == "RGB" and min(picture.size) >= 8
    assert sample.source.stamp() == sample.source.stamp() != ""
    assert card.template.count("{}") == 1 and card.metric.startswith("map") == card.multilabel


def test_every_torchvision_class_of_a_card_has_a_layout() -> None:
    options = [split.options for name, part in CASES for split in [find_card(name).with_split(part)]]
    used = {one.dataset for one in options if isinstance(one, TorchvisionOptions)}
    assert used <= set(TORCHVISION) and len(CARDS) >= 30
