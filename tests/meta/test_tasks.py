"""Captions as class names, and tasks: two domains of one topic, different captions, pseudo-classes of the support."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlprompt.backbone import Backbone
from vlprompt.errors import ConfigError, DataError
from vlprompt.meta.clustering import Clusters
from vlprompt.meta.tasks import Task, TaskSampler, fit_captions
from vlprompt.prompts import check_class_names

WORDS = "red blue green old new small large round".split()


def toy(topics: int = 3, domains: int = 3, captions: int = 8, copies: int = 2) -> tuple[Clusters, list[str]]:
    """Return clusters in which every domain holds ``copies`` pairs of each caption of its topic."""
    cells = [(t, d, c) for t in range(topics) for d in range(domains) for c in range(captions) for _ in range(copies)]
    topic, domain, _ = torch.tensor(cells).t().contiguous()
    kept = torch.ones(topics, domains, dtype=torch.bool)
    clusters = Clusters(topic, domain, torch.zeros(topics, 4), torch.zeros(topics, domains, 4), kept)
    return clusters, [f"a {WORDS[c % 8]} thing {c} of kind {t}" for t, _, c in cells]


def sampler(**changes: Any) -> TaskSampler:
    clusters, captions = toy()
    return TaskSampler(clusters, captions, **{"support": 4, "query": 6, "seed": 1, **changes})


def features(captions: list[str], groups: int = 3) -> torch.Tensor:
    """Return ``[N, groups]``: the number in a caption selects the nearest axis; equal captions have equal features."""
    numbers = torch.tensor([int(caption.split()[3]) for caption in captions])
    offsets = torch.stack([numbers.cos(), numbers.sin(), (2 * numbers).cos()], dim=1)
    return 5 * (F.one_hot(numbers % groups, groups) + 0.1 * offsets)


def tasks_of(ours: TaskSampler, count: int = 30) -> list[Task]:
    return [ours.task(step, slot) for step in range(count // 2) for slot in range(2)]


# -- captions ---------------------------------------------------------------------------------------------------------
def test_captions_become_class_names(tiny_backbone: Backbone) -> None:
    given = [
        "a  photo\n of\ta cat",
        "snake_case {braced}",
        "soft\u00adhyphen and \u200dzero\ufeff width \x07 bell",
        "one two three four five six seven eight nine ten",
        "word " * 3000,
    ]
    fitted = fit_captions(tiny_backbone.text, given, 8)
    assert fitted[:4] == [
        "a photo of a cat",
        "snake_case (braced)",
        "softhyphen and zero width bell",
        "one two three four five six seven eight",
    ]
    assert fitted[4] == " ".join(["word"] * 8)
    assert check_class_names(fitted) == fitted
    assert all(len(tiny_backbone.text.tokens(text)) - 2 <= 8 for text in fitted)


def test_words_are_never_cut(tiny_backbone: Backbone) -> None:
    assert fit_captions(tiny_backbone.text, ["a floccinaucinihilipilification"], 3) == ["a"]
    long = "antidisestablishmentarianism " * 20  # reaches 200 characters before 300 tokens
    (fitted,) = fit_captions(tiny_backbone.text, [long], 300)
    assert len(fitted) <= 200 and set(fitted.split()) == {"antidisestablishmentarianism"}


def test_captions_that_become_empty_are_listed(tiny_backbone: Backbone) -> None:
    given = ["fine", " \n", "___", "x" * 3000, "\u200d\ufeff", "floccinaucinihilipilification", "&nbsp;"]
    with pytest.raises(DataError) as error:
        fit_captions(tiny_backbone.text, given, 3)
    text = str(error.value)
    assert text.startswith("captions without a word") and "pair 0" not in text
    assert all(f"pair {row}: " in text for row in range(1, 7)) and "tasks.caption_tokens" in text and len(text) < 1000


def test_number_of_tokens_must_be_positive(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="tasks.caption_tokens is 0; accepted: whole numbers from 1"):
        fit_captions(tiny_backbone.text, ["a"], 0)


# -- tasks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", ["captions", "clusters"])
def test_support_and_query_share_no_domain(labels: str) -> None:
    clusters, captions = toy()
    ours = sampler(labels=labels, classes=3, caption_features=features(captions))
    for task in tasks_of(ours):
        assert task.source_domain != task.target_domain
        for rows, domain, count in ((task.support, task.source_domain, 4), (task.query, task.target_domain, 6)):
            assert {(int(clusters.topic[row]), int(clusters.domain[row])) for row in rows} == {(task.topic, domain)}
            assert len(rows) == len({captions[row] for row in rows}) == count


def test_every_topic_domain_and_pair_is_drawn() -> None:
    drawn = tasks_of(sampler(), 400)
    assert {task.topic for task in drawn} == {0, 1, 2}
    assert len({(task.source_domain, task.target_domain) for task in drawn}) == 6
    assert {row for task in drawn for row in task.support} == set(range(3 * 3 * 8 * 2))


def test_captions_are_classes() -> None:
    captions = toy()[1]
    task = sampler().task(0, 0)
    assert task.support_classes == tuple(captions[row] for row in task.support)
    assert task.query_classes == tuple(captions[row] for row in task.query)
    assert task.support_labels == (0, 1, 2, 3) and task.query_labels == (0, 1, 2, 3, 4, 5)


def test_captions_that_differ_only_in_case_are_equal() -> None:
    clusters, captions = toy(captions=4, copies=2)
    captions = [caption.upper() if row % 2 else caption for row, caption in enumerate(captions)]
    for task in tasks_of(TaskSampler(clusters, captions, support=4, query=4, seed=0)):
        assert len({name.lower() for name in task.support_classes}) == 4
    with pytest.raises(ConfigError, match="5 different captions"):
        TaskSampler(clusters, captions, support=5, query=4, seed=0)


@pytest.mark.parametrize("labels", ["captions", "clusters"])
def test_tasks_depend_only_on_seed_step_and_slot(labels: str) -> None:
    options: dict[str, Any] = {"labels": labels, "caption_features": features(toy()[1])}
    first, second = sampler(**options), sampler(**options)
    later = second.task(7, 1)  # drawn in another order
    assert [first.task(0, 0), first.task(0, 1), first.task(7, 1)] == [second.task(0, 0), second.task(0, 1), later]
    assert len({first.task(0, 0), first.task(0, 1), first.task(1, 0), sampler(seed=2, **options).task(0, 0)}) == 4


# -- pseudo-classes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_support_has_every_pseudo_class(classes: int) -> None:
    captions = toy()[1]
    for task in tasks_of(sampler(labels="clusters", classes=classes, caption_features=features(captions))):
        assert task.support_classes == task.query_classes
        assert 2 <= len(set(task.support_classes)) == len(task.support_classes) <= classes
        assert set(task.support_labels) == set(range(len(task.support_classes)))
        assert set(task.query_labels) <= set(task.support_labels)
        label_of: dict[str, int] = {}
        rows = [*zip(task.support, task.support_labels, strict=True), *zip(task.query, task.query_labels, strict=True)]
        for row, label in rows:  # a caption has one class; a class is named by one of its captions
            assert label_of.setdefault(captions[row], label) == label
        assert all(label_of[name] == label for label, name in enumerate(task.support_classes))


def test_pseudo_classes_are_the_planted_groups() -> None:
    captions = toy()[1]
    for task in tasks_of(
        sampler(support=8, query=8, labels="clusters", classes=3, caption_features=features(captions))
    ):
        groups = [[int(captions[row].split()[3]) % 3 for row in rows] for rows in (task.support, task.query)]
        matches = set(zip(groups[0] + groups[1], task.support_labels + task.query_labels, strict=True))
        assert len(matches) == 3


def test_domains_with_separate_captions_still_have_two_classes() -> None:
    # Captions of domain 1 are far from those of domain 0, so two joint groups would be the two domains.
    clusters, _ = toy(topics=1, domains=2, captions=4, copies=1)
    captions = [f"caption {row}" for row in range(8)]
    near = torch.tensor([[1, 0.1, 0], [1, 0.12, 0], [1, -0.1, 0], [1, -0.12, 0]])
    ours = TaskSampler(
        clusters, captions, support=4, query=4, labels="clusters", classes=2, seed=0,
        caption_features=torch.cat([near, near[:, [2, 1, 0]]]),
    )  # fmt: skip
    for task in tasks_of(ours, 8):
        assert len(task.support_classes) == 2
        assert sorted(task.support_labels) == sorted(task.query_labels) == [0, 0, 1, 1]


# -- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support": 1}, "tasks.support is 1; accepted: whole numbers from 2"),
        ({"query": 2.0}, "tasks.query is 2.0"),
        ({"classes": 1}, "tasks.classes is 1"),
        ({"seed": -3}, "seed is -3"),
        ({"labels": "cluster"}, "tasks.labels is 'cluster'. Did you mean 'clusters'"),
        ({"labels": "clusters", "classes": 5}, "at most tasks.support, which is 4"),
        ({"labels": "clusters"}, "needs caption_features"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler(**changes)


def test_captions_or_features_of_other_pairs_are_refused() -> None:
    clusters, captions = toy()
    with pytest.raises(DataError, match="143 captions for 144 clustered pairs"):
        TaskSampler(clusters, captions[1:], seed=0)
    with pytest.raises(DataError, match="3 caption features for 144 clustered pairs"):
        TaskSampler(clusters, captions, seed=0, caption_features=torch.zeros(3, 4))


def test_no_usable_topic_lists_all_topics() -> None:
    clusters, captions = toy(topics=2, domains=2)
    clusters.kept[1, 0] = False
    with pytest.raises(ConfigError) as error:
        TaskSampler(clusters, captions, support=9, query=4, seed=0)
    text = str(error.value)
    assert "9 different captions" in text and "      0  8, 8\n" in text and "      1  8, (8)\n" in text
    assert "tasks.support and tasks.query; 8 at most for the domains" in text
    assert all(f"tasks.{name}" in text for name in ("topics", "domains", "least", "support", "query"))
    clusters.kept[:] = False
    with pytest.raises(ConfigError, match=r"tasks.query\.$"):
        TaskSampler(clusters, captions, support=2, query=2, seed=0)


def test_topics_with_one_usable_domain_are_skipped() -> None:
    clusters, captions = toy()
    clusters.kept[1, :2] = False
    clusters.kept[2, 0] = False
    ours = TaskSampler(clusters, captions, support=4, query=4, seed=0)
    assert ours.usable == {0: (0, 1, 2), 2: (1, 2)}
    assert {task.topic for task in tasks_of(ours)} == {0, 2}
