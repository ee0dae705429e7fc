"""Topics and domains: planted clusters, completeness, reproducibility and the file of clusters."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlprompt.errors import ConfigError, DataError
from vlprompt.meta import clustering
from vlprompt.meta.clustering import Clusters, cluster, spherical_kmeans, without_caption

TOPICS, DOMAINS, EACH = 4, 3, 10


def planted(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw image and caption features ``[120, 32]`` and the true ``(topic, domain)`` ``[120, 2]``, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    truth = torch.cartesian_prod(torch.arange(TOPICS), torch.arange(DOMAINS)).repeat(EACH, 1)
    truth = truth[torch.randperm(len(truth), generator=generator)]

    def noisy(x: Tensor) -> Tensor:
        lengths = 1 + 9 * torch.rand(len(x), 1, generator=generator)  # only the direction matters
        return lengths * (x + 0.05 * torch.randn(x.shape, generator=generator))

    topic = axes[truth[:, 0]]
    return noisy(topic + axes[TOPICS + truth[:, 1]]), noisy(topic), truth


def same(a: Clusters, b: Clusters) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Clusters))


def clustered(seed: int = 0, **changes: int) -> Clusters:
    images, captions, _ = planted()
    return cluster(images, captions, **{"topics": TOPICS, "domains": DOMAINS, "least": 2, "seed": seed, **changes})


def test_planted_topics_and_domains_are_found() -> None:
    clusters, truth = clustered(), planted()[2]
    ours = torch.stack([clusters.topic, clusters.domain], dim=1).tolist()
    pairs = {(tuple(a), tuple(b)) for a, b in zip(ours, truth.tolist(), strict=True)}
    assert len(pairs) == TOPICS * DOMAINS  # one to one
    assert clusters.kept.all()


def test_rows_belong_to_the_nearest_unit_centre() -> None:
    images, captions, _ = planted()
    clusters = clustered()
    assert torch.allclose(clusters.topic_centres.norm(dim=1), torch.ones(TOPICS))
    assert torch.allclose(clusters.domain_centres.norm(dim=2), torch.ones(TOPICS, DOMAINS))
    assert torch.equal((F.normalize(captions, dim=1) @ clusters.topic_centres.t()).argmax(1), clusters.topic)
    cosines = torch.einsum("nd,nkd->nk", F.normalize(images, dim=1), clusters.domain_centres[clusters.topic])
    assert torch.equal(cosines.argmax(1), clusters.domain)


@given(
    st.integers(1, 30), st.integers(1, 8), st.integers(2, 5), st.integers(1, 9), st.booleans(), st.integers(0, 2**40)
)
@settings(max_examples=40, deadline=None)
def test_every_pair_has_exactly_one_topic_and_domain(
    pairs: int, topics: int, domains: int, least: int, repeated: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    images, captions = torch.randn(2, pairs, 5, generator=generator)
    if repeated:  # fewer different captions than topics
        captions = captions[torch.arange(pairs) % 2]
    clusters = cluster(images, captions, topics=topics, domains=domains, least=least, seed=seed)
    members = clusters.members()
    assert sorted(row for rows in members.values() for row in rows) == list(range(pairs))
    for topic in range(topics):
        assert bool(clusters.topic_centres[topic].any()) == any(key[0] == topic for key in members)
        for domain in range(domains):
            size = len(members.get((topic, domain), []))
            assert bool(clusters.kept[topic, domain]) == (size >= least)
            assert bool(clusters.domain_centres[topic, domain].any()) == (size > 0)


def test_the_result_depends_on_the_seed_and_not_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(1))

    def run(seed: int) -> Clusters:
        return cluster(noise[0], noise[1], topics=5, domains=3, least=1, seed=seed)

    from threadpoolctl import threadpool_limits

    first = run(3)
    for threads in (1, 2):
        with threadpool_limits(threads):
            assert same(first, run(3))
    assert not same(first, run(4))
    monkeypatch.setattr(clustering, "EXACT_ROWS", 10)  # mini-batches
    assert same(run(3), run(3)) and not same(first, run(3))


def test_mini_batches_find_planted_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = clustered()
    monkeypatch.setattr(clustering, "EXACT_ROWS", 10)
    approximate = clustered()
    assert len(set(zip(exact.topic.tolist(), approximate.topic.tolist(), strict=True))) == TOPICS


def test_small_domains_are_not_kept() -> None:
    assert not clustered(least=EACH + 1).kept.any()
    assert clustered(least=EACH).kept.all()


def test_fewer_rows_than_clusters() -> None:
    labels, centres = spherical_kmeans(torch.eye(2), 5, 0)
    assert sorted(labels.tolist()) == [0, 1] and centres.shape == (5, 2)
    assert torch.equal(centres[labels], torch.eye(2)) and not centres[2:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topics": 0}, "tasks.topics is 0; accepted: whole numbers from 1"),
        ({"domains": 1}, "tasks.domains is 1; accepted: whole numbers from 2"),
        ({"least": True}, "tasks.least is True"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clustered(**changes)


def test_unsuitable_features_are_refused() -> None:
    images, captions, _ = planted()
    options = {"topics": 2, "domains": 2, "least": 1, "seed": 0}
    for first, second in ((images[:5], captions), (images[0], captions), (images[:0], captions[:0])):
        with pytest.raises(DataError, match="have shapes"):
            cluster(first, second, **options)
    captions[7, 2] = float("nan")
    with pytest.raises(DataError, match="caption features are not finite numbers in 1 of 120 rows, first in row 7"):
        cluster(images, captions, **options)


def test_missing_scikit_learn_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r'pip install "vlprompt\[meta\]"'):
        clustered()


def test_saved_clusters_are_restored(tmp_path: Path) -> None:
    clusters, path = clustered(), tmp_path / "clusters.safetensors"
    clusters.save(path)
    clusters.save(path)  # replaces the older file
    assert same(Clusters.load(path), clusters)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clusters.safetensors"
    clustered().save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged"):
            Clusters.load(path)


def test_other_files_and_missing_folders_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"topic": torch.zeros(3)}, other)
    with pytest.raises(DataError, match="holds no clusters: its schema is 'no schema'"):
        Clusters.load(other)
    with pytest.raises(DataError, match="There is no file"):
        Clusters.load(tmp_path / "none")
    with pytest.raises(DataError, match="cannot be written"):
        clustered().save(tmp_path / "none" / "clusters.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("topic", torch.full((120,), TOPICS), "topic holds numbers outside 0 to 3"),
        ("domain", torch.full((120,), -1), "domain holds numbers outside 0 to 2"),
        ("domain", torch.zeros(5, dtype=torch.int64), "domain \\[5\\]"),
        ("kept", torch.ones(2, 2, dtype=torch.bool), "kept has shape"),
        ("kept", torch.ones(TOPICS, DOMAINS), "kept is torch.float32"),
        ("topic_centres", torch.zeros(3), "expected topic \\[N\\]"),
    ],
)
def test_mismatched_clusters_are_refused(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(clustered(), **{name: value})


def test_residuals_hold_the_style_and_not_the_content_of_captions() -> None:
    generator = torch.Generator().manual_seed(3)
    contents = F.normalize(torch.randn(40, 16, generator=generator), dim=1)
    styles = torch.randn(2, 16, generator=generator)
    content, style = torch.arange(400) % 40, torch.arange(400) // 200
    images = 4 * contents[content] @ torch.randn(16, 16, generator=generator) + styles[style]

    def agreement(features: torch.Tensor) -> float:
        labels, _ = spherical_kmeans(features, 2, 0)
        same = float((labels == style).float().mean())
        return max(same, 1 - same)

    assert agreement(without_caption(images, contents[content])) > 0.95
    assert agreement(images) < 0.7
