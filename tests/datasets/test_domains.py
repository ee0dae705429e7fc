"""Domains: selected samples, refused values, and the rounds of domain generalisation protocols."""

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
from vlprompt.errors import ConfigError

Load = Callable[..., FewShotTask]


@pytest.fixture
def load(toy_sets: Path) -> Load:
    return lambda name="toy-styles", **values: load_dataset(name, root=toy_sets, **values)


def counts(samples: list[Sample]) -> dict[str, int]:
    return dict(Counter(sample.domain for sample in samples))


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[[SplitLists], SplitLists]) -> None:
    """Apply ``change`` to the lists that the toy reader returns."""
    read = readers.reader("toy")
    monkeypatch.setattr(readers, "reader", lambda name: lambda card, base, report: change(read(card, base, report)))


# -- choosing ---------------------------------------------------------------------------------------------------------
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
    assert task.split_sha256 == whole.split_sha256  # still the hash of the complete data set
    assert task.class_names == whole.class_names


@pytest.mark.parametrize("seed", [0, 3])
def test_the_draw_is_over_the_chosen_domains(seed: int, load: Load) -> None:
    whole, task = load(shots=-1), load(shots=2, seed=seed, source=["a", "b"])
    train, val = ([sample for sample in samples if sample.domain in "ab"] for samples in (whole.train, whole.val))
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


def test_by_domain_splits_only_the_test_samples(load: Load) -> None:
    task = load(shots=1, classes="base")
    tasks = task.by_domain()
    assert list(tasks) == ["c", "c+noise", "a", "a+blur", "a+noise", "b", "b+noise"]
    for name, domain_task in tasks.items():
        assert counts(domain_task.test) == {name: counts(task.test)[name]}
        assert dataclasses.replace(domain_task, test=task.test) == task
    assert list(load(target=["b+noise", "a"]).by_domain()) == ["a", "b+noise"]
    assert load("toy-plain").by_domain() == {}


def test_domains_have_the_order_of_the_card(toy_sets: Path) -> None:
    samples = [Sample("", 0, FileSource(""), name) for name in ("x", "b+n", "c", "b")]
    assert domains_of(find_card("toy-styles"), samples) == ["c", "b", "b+n", "x"]
    assert [split_domain(name) for name in ("a", "a+noise")] == [("a", "clean"), ("a", "noise")]


# -- refused values ---------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "misspelled version": (
        "toy-styles",
        {"target": ["c+nois"]},
        r"data.target names 'c\+nois', which is not a domain of toy-styles with test images. Did you mean 'c\+noise'",
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
    "not a text": ("toy-styles", {"source": [1]}, "data.source names 1, which is not a domain"),
    "no domains, source": ("toy-plain", {"source": ["a"]}, r"data.source is \['a'\], but toy-plain has no domains"),
    "no domains, target": ("plainest", {"target": ["a"]}, r"data.target is \['a'\], but toy-plain has no domains"),
}


@pytest.mark.parametrize("case", BAD)
def test_domains_that_cannot_be_used(case: str, load: Load) -> None:
    name, values, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        load(name, **values)


def test_a_class_without_training_images_is_named(load: Load, toy_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_a_class(lists: SplitLists) -> SplitLists:
        return dataclasses.replace(lists, train=[s for s in lists.train if (s.domain, s.label) != ("a", 1)])

    name = load().class_names[1]
    replaced(monkeypatch, without_a_class)
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


# -- protocols --------------------------------------------------------------------------------------------------------
def test_leave_one_out(toy_sets: Path) -> None:
    rounds = domain_rounds("toy-styles", toy_sets, "leave-one-out")
    assert [(entry.domain, entry.source, entry.target) for entry in rounds] == [
        ("c", ("a", "b"), ("c", "c+noise")),
        ("a", ("c", "b"), ("a", "a+blur", "a+noise")),
        ("b", ("c", "a"), ("b", "b+noise")),
    ]


def test_single_source(toy_sets: Path) -> None:
    rounds = domain_rounds("toy-styles", toy_sets, "single-source")
    assert [(entry.domain, entry.source, entry.target) for entry in rounds] == [
        ("c", ("c",), ("a", "a+blur", "a+noise", "b", "b+noise")),
        ("a", ("a",), ("c", "c+noise", "b", "b+noise")),
        ("b", ("b",), ("c", "c+noise", "a", "a+blur", "a+noise")),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_source_and_target_of_a_round_are_disjoint(protocol: str, load: Load, toy_sets: Path) -> None:
    for entry in domain_rounds("toy-styles", toy_sets, protocol):
        task = load(source=entry.source, target=entry.target)
        trained = {split_domain(sample.domain)[0] for sample in task.train + task.val}
        assert trained == set(entry.source)
        assert not trained & {split_domain(sample.domain)[0] for sample in task.test}


def test_refused_rounds(toy_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ConfigError, match=r"training images of \['b'\] only; leave-one-out needs two or more domains"):
        domain_rounds("toy-styles", toy_sets, "leave-one-out")
