"""Every card reads an invented mini data set in the layout that it describes."""

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

# Packaged data sets have other tests; `folder` has no layout on its card.
CARDS = [name for name in list_datasets() if not find_card(name).packaged and name != "folder"]
# A card whose splits have readers is read with every split.
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

    assert {split: len(getattr(lists, split)) for split in SPLITS} == expected.counts
    assert sum(expected.counts.values()) > 0 and expected.counts["test"] > 0
    assert lists.class_names == expected.class_names == (card_class_names(card) or expected.class_names)
    assert len(lists.class_names) == card.classes.count
    for split in SPLITS:
        samples = getattr(lists, split)
        assert len({sample.id for sample in samples}) == len(samples)
        # Every label occurs.
        seen = {label for sample in samples for label in labels_of(sample)}
        assert seen == (set(range(len(lists.class_names))) if samples else set())
        assert all(isinstance(sample.label, tuple) == card.multilabel for sample in samples)
    domains = {sample.domain for split in SPLITS for sample in getattr(lists, split)}
    assert domains == (expected.domains or {""})

    sample = lists.test[-1]
    image = sample.source.open()
    assert image.mode == "RGB" and min(image.size) >= 8
    assert sample.source.stamp() == sample.source.stamp() != ""
    assert card.template.count("{}") == 1 and card.metric.startswith("map") == card.multilabel


def test_every_torchvision_class_of_a_card_has_a_layout() -> None:
    options = [find_card(name).with_split(split).options for name, split in CASES]
    used = {entry.dataset for entry in options if isinstance(entry, TorchvisionOptions)}
    assert used <= set(TORCHVISION) and len(CARDS) >= 30
