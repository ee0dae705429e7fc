"""Domains: which samples a task keeps, what is refused, and what the protocols of domain generalisation pair."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt._files import sha256_lines
from vlprompt.datasets import FewShotTask, FileSource, Sample, SplitLists, fewshot, find_card, load_dataset, readers
from vlprompt.datasets.domains import PROTOCOLS, check_protocol, domain_rounds, domains_of, split_domain
from vlprompt.datasets.task import dataset_names
from vlprompt.errors import ConfigError

Load = Callable[..., FewShotTask]


@pytest.fixture
def load(toy_sets: Path) -> Load:
    return lambda name="toy-styles", **values: load_dataset(name, root=toy_sets, **values)


def counts(samples: list[Sample]) -> dict[str, int]:
    return dict(Counter(sample.domain for sample in samples))


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[[SplitLists], SplitLists]) -> None:
    """Let the reader of the toys give changed lists."""
    read = readers.reader("toy")
    monkeypatch.setattr(readers, "reader", lambda name: lambda card, base, report: change(read(card, base, report)))


# -- choosing -------------------------------------------------------------------------------------------------------
def test_all_domains_unless_some_are_chosen(load: Load) -> None:
    task = load(shots=-1)
    assert counts(task.train) == {"a": 12, "b": 12, "c": 12} and counts(task.val) == {"a": 4, "b": 4, "c": 4}
    assert counts(task.test) == {"a": 12, "a+blur": 12, "a+noise": 12, "b": 4, "b+noise": 4, "c": 8, "c+noise": 8}
    assert (task.source, task.target) == ((), ())


def test_chosen_domains_are_kept_in_the_order_of_the_files(load: Load) -> None:
    whole, task = load(shots=-1), load(shots=-1, source=["c", "a"], target=["b+noise", "c"])
    assert task.train == [sample for sample in whole.train if sample.domain in "ca"]
    assert task.val == [sample for sample in whole.val if sample.domain in "ca"]
    assert task.test == [sample for sample in whole.test if sample.domain in ("b+noise", "c")]
    assert task.split_sha256 == whole.split_sha256  # still that of the whole data set
    assert task.class_names == whole.class_names


@pytest.mark.parametrize("seed", [0, 3])
def test_the_draw_is_over_the_chosen_domains(seed: int, load: Load) -> None:
    whole, task = load(shots=-1), load(shots=2, seed=seed, source=["a", "b"])
    train, val = ([one for one in part if one.domain in "ab"] for part in (whole.train, whole.val))
    assert (task.train, task.val) == fewshot(train, val, 2, seed)
    assert Counter(sample.label for sample in task.train) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert task.shots_sha256 == sha256_lines(sample.id for sample in task.train)
    assert task.test == whole.test


def test_base_and_new_keep_the_domains(load: Load) -> None:
    base = load(shots=1, classes="base", source=["c"], target=["a"])
    new = base.counterpart()
    assert (new.source, new.target, new.classes) == (("c",), ("a",), "new") and new.counterpart() == base
    for task, names in ((base, base.all_class_names[:2]), (new, base.all_class_names[2:])):
        assert task.class_names == names and counts(task.train) == {"c": 2} and counts(task.test) == {"a": 6}


def test_domains_are_recorded_only_where_there_are_some(load: Load) -> None:
    assert load(source=["a"], target=["c", "b"]).describe().items() >= {"source": ["a"], "target": ["c", "b"]}.items()
    plain = load("toy-plain").describe()
    assert "source" not in plain and "target" not in plain


def test_by_domain_cuts_the_test_samples_and_nothing_else(load: Load) -> None:
    task = load(shots=1, classes="base")
    parts = task.by_domain()
    assert list(parts) == ["c", "c+noise", "a", "a+blur", "a+noise", "b", "b+noise"]
    for name, part in parts.items():
        assert counts(part.test) == {name: counts(task.test)[name]}
        assert dataclasses.replace(part, test=task.test) == task
    assert list(load(target=["b+noise", "a"]).by_domain()) == ["a", "b+noise"]
    assert load("toy-plain").by_domain() == {}


def test_the_order_of_domains_is_the_cards(toy_sets: Path) -> None:
    found = domains_of(
        find_card("toy-styles"), [Sample("", 0, FileSource(""), name) for name in ("x", "b+n", "c", "b")]
    )
    assert found == ["c", "b", "b+n", "x"]
    assert [split_domain(name) for name in ("a", "a+noise")] == [("a", "clean"), ("a", "noise")]


# -- what is refused ------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "misspelled version": (
        "toy-styles",
        {"target": ["c+nois"]},
        r"data.target names 'c\+nois', which is no domain of toy-styles with test images. Did you mean 'c\+noise'",
    ),
    "unknown, nothing near": ("toy-styles", {"source": ["zebra"]}, "names 'zebra', .* Accepted: c, a, b."),
    "corrupted source": (
        "toy-styles",
        {"source": ["a", "a+noise"]},
        r"data.source names 'a\+noise', .* training imag",
    ),
    "both wrong": ("toy-styles", {"source": ["x1"], "target": ["y1"]}, "(?s)data.source names 'x1'.*target names 'y1'"),
    "twice": ("toy-styles", {"target": ["b", "b"]}, "data.target names 'b' twice"),
    "a text": ("toy-styles", {"source": "a"}, r"data.source is the text 'a'; accepted: a list of names, \['a'\]"),
    "not a text": ("toy-styles", {"source": [1]}, "data.source names 1, which is no domain"),
    "no domains, source": ("toy-plain", {"source": ["a"]}, r"data.source is \['a'\], but toy-plain has no domains"),
    "no domains, target": ("plainest", {"target": ["a"]}, r"data.target is \['a'\], but toy-plain has no domains"),
}


@pytest.mark.parametrize("case", BAD)
def test_domains_that_cannot_be_used(case: str, load: Load) -> None:
    name, values, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        load(name, **values)


def test_a_class_that_loses_its_training_images_is_named(
    load: Load, toy_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_one(lists: SplitLists) -> SplitLists:
        return dataclasses.replace(lists, train=[s for s in lists.train if (s.domain, s.label) != ("a", 1)])

    name = load().class_names[1]
    replaced(monkeypatch, without_one)
    assert counts(load(shots=-1, source=["a", "b"]).train) == {"a": 9, "b": 12}
    with pytest.raises(
        ConfigError, match=rf"data.source is \['a'\], which leaves .* without training images: '{name}'\."
    ):
        load(source=["a"])
    with pytest.raises(
        ConfigError, match=rf"(?s)single-source cannot be run on toy-styles:.*\['a'\], .*'{name}'"
    ) as caught:
        domain_rounds("toy-styles", toy_sets, "single-source")
    assert len(str(caught.value).splitlines()) == 2
    assert len(domain_rounds("toy-styles", toy_sets, "leave-one-out")) == 3


def test_a_target_without_test_images_of_the_classes(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_new(lists: SplitLists) -> SplitLists:
        return dataclasses.replace(lists, test=[s for s in lists.test if s.domain != "b" or s.label > 1])

    replaced(monkeypatch, only_new)
    assert counts(load(target=["b"], classes="new").test) == {"b": 2}
    with pytest.raises(ConfigError, match=r"data.target is \['b'\], which has no test images of the base classes"):
        load(target=["b"], classes="base")


# -- protocols ------------------------------------------------------------------------------------------------------
def test_leave_one_out(toy_sets: Path) -> None:
    assert [(one.domain, one.source, one.target) for one in domain_rounds("toy-styles", toy_sets, "leave-one-out")] == [
        ("c", ("a", "b"), ("c", "c+noise")),
        ("a", ("c", "b"), ("a", "a+blur", "a+noise")),
        ("b", ("c", "a"), ("b", "b+noise")),
    ]


def test_single_source(toy_sets: Path) -> None:
    assert [(one.domain, one.source, one.target) for one in domain_rounds("toy-styles", toy_sets, "single-source")] == [
        ("c", ("c",), ("a", "a+blur", "a+noise", "b", "b+noise")),
        ("a", ("a",), ("c", "c+noise", "b", "b+noise")),
        ("b", ("b",), ("c", "c+noise", "a", "a+blur", "a+noise")),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_round_tests_on_what_it_trains_on(protocol: str, load: Load, toy_sets: Path) -> None:
    for one in domain_rounds("toy-styles", toy_sets, protocol):
        task = load(source=one.source, target=one.target)
        trained = {split_domain(sample.domain)[0] for sample in task.train + task.val}
        assert trained == set(one.source)
        assert not trained & {split_domain(sample.domain)[0] for sample in task.test}


def test_rounds_that_cannot_be(toy_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="toy-plain has no domains; single-source needs a data set whose card names"):
        domain_rounds("plainest", toy_sets, "single-source")
    with pytest.raises(ConfigError, match="protocol is 'leave-one'; accepted: leave-one-out or single-source. Did you"):
        domain_rounds("toy-styles", toy_sets, "leave-one")
    with pytest.raises(ConfigError, match="protocol is ''; accepted: leave-one-out or single-source$"):
        check_protocol("")
    with monkeypatch.context() as patch:
        replaced(patch, lambda lists: dataclasses.replace(lists, test=[s for s in lists.test if s.domain != "a"]))
        with pytest.raises(ConfigError, match=r"no test images of \['a'\]; leave-one-out tests on every clean domain"):
            domain_rounds("toy-styles", toy_sets, "leave-one-out")
    replaced(monkeypatch, lambda lists: dataclasses.replace(lists, train=[s for s in lists.train if s.domain == "b"]))
    with pytest.raises(ConfigError, match=r"training images of \['b'\] alone; leave-one-out needs two domains"):
        domain_rounds("toy-styles", toy_sets, "leave-one-out")


# -- several data sets ----------------------------------------------------------------------------------------------
def test_names_of_several_data_sets() -> None:
    assert dataset_names(["demo", "DescribableTextures"]) == ["demo", "dtd"]
    for names, message in (
        (["dmo", "dtd", "calltech101"], "'dmo' is no data set. Did you mean 'demo'.*'calltech101' is no data set. Did"),
        (["dtd", "demo", "DescribableTextures"], "datasets: 'dtd' is named twice"),
        ([], "datasets: none is named; accepted: names with commas, demo,dtd"),
        ([""], "'' is no data set. Accepted: caltech101"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataset_names(names)
