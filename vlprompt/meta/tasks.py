"""Meta-tasks from clustered pairs: support and query from two visual domains of one topic."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbone import TextTower
from vlprompt.errors import ConfigError, DataError, bulleted, did_you_mean
from vlprompt.meta.clustering import Clusters, spherical_kmeans
from vlprompt.prompts.words import words_of

Labels = Literal["captions", "clusters"]
#: Maximum number of characters of a class name.
_MAX_CHARACTERS = 200


def fit_captions(tower: TextTower, captions: Sequence[str], tokens: int) -> list[str]:
    """Return ``captions`` as class names: cleaned, and truncated after whole words.

    White space and unprintable characters become single blanks. Invisible marks (soft hyphens, joiners) are removed.
    Braces, which mark the name in a template, become parentheses.

    Args:
        tower: Text tower, whose tokenizer counts byte-pair tokens.
        captions: N texts.
        tokens: Maximum number of byte-pair tokens of a caption, without start- and end-of-text.

    Returns:
        N texts of at most ``tokens`` tokens and 200 characters.

    Raises:
        ConfigError: ``tokens`` is not a whole number from 1.
        DataError: Some captions become empty; the text lists them.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tasks.caption_tokens is {tokens!r}; accepted: whole numbers from 1.")
    names = {caption: _fitted(tower, caption, tokens) for caption in dict.fromkeys(captions)}
    empty = [f"pair {row}: {caption[:80]!r}" for row, caption in enumerate(captions) if not names[caption]]
    if empty:
        raise DataError(
            f"captions without a word, or with a first word of more than {tokens} tokens:\n{bulleted(empty)}\n"
            "Remove these pairs, or increase tasks.caption_tokens."
        )
    return [names[caption] for caption in captions]


def _fitted(tower: TextTower, caption: str, tokens: int) -> str:
    cleaned = (c if c.isprintable() else " " for c in caption if unicodedata.category(c) != "Cf")
    words = "".join(cleaned).replace("{", "(").replace("}", ")").split()[:tokens]  # a word has at least one token
    while words:
        text = " ".join(words)
        # Characters first, because a text without blanks may be very long. Start- and end-of-text do not count.
        if len(text) <= _MAX_CHARACTERS and len(tower.tokens(text)) - 2 <= tokens:
            # In prompts it is a class name, whose underscores are spaces.
            count = len(tower.tokens(words_of(text))) - 2
            if count <= tokens:
                return text if count else ""
        words.pop()
    return ""


@dataclass(frozen=True)
class Task:
    """S support and Q query pairs of two domains of one topic, with their classes.

    Attributes:
        topic: Topic of all pairs.
        source_domain: Domain of the support inside the topic.
        target_domain: Domain of the query, different from that of the support.
        support: S rows of pairs with different captions.
        query: Q rows of pairs with different captions; a caption may occur in both support and query.
        support_classes: Class names of the support.
        support_labels: S positions in ``support_classes``.
        query_classes: Class names of the query; those of the support with ``labels=clusters``.
        query_labels: Q positions in ``query_classes``.
    """

    topic: int
    source_domain: int
    target_domain: int
    support: tuple[int, ...]
    query: tuple[int, ...]
    support_classes: tuple[str, ...]
    support_labels: tuple[int, ...]
    query_classes: tuple[str, ...]
    query_labels: tuple[int, ...]


class TaskSampler:
    """Draws tasks that depend only on ``(seed, step, slot)``, so resumed and distributed runs draw the same tasks.

    A domain is usable if it is kept and has at least ``max(support, query)`` different captions, ignoring case. A task
    draws uniformly a topic with two or more usable domains, two of these domains, different captions, and one pair of
    each caption.

    The classes of a task are:

    - ``captions``: every caption is a class, separately for support and query.
    - ``clusters``: the different captions of support and query together are grouped by k-means on their features.
      Captions of groups without a support caption move to the nearest remaining centre. If only one group would remain
      because support and query separate, the centres are computed from the captions of the support. There are at most
      ``classes`` classes, the support has an example of each, and a class is named by the caption nearest to its
      centre.

    Args:
        clusters: Clusters of N pairs.
        captions: N captions that can be class names (:func:`fit_captions`).
        support: S, the number of support pairs of a task.
        query: Q, the number of query pairs of a task.
        labels: ``captions`` or ``clusters``.
        classes: Maximum number of classes of a task with ``labels=clusters``.
        seed: Seed of all tasks.
        caption_features: ``[N, D]``, required with ``labels=clusters``.

    Attributes:
        usable: The usable domains of every topic that has two or more.

    Raises:
        ConfigError: A setting is not accepted, or no topic is usable; the text then lists all topics.
        DataError: The number of captions or features differs from that of the pairs.
    """

    def __init__(
        self,
        clusters: Clusters,
        captions: Sequence[str],
        *,
        support: int = 16,
        query: int = 16,
        labels: Labels = "captions",
        classes: int = 4,
        seed: int,
        caption_features: Tensor | None = None,
    ) -> None:
        if labels not in get_args(Labels):
            raise ConfigError(f"tasks.labels is {labels!r}.{did_you_mean(str(labels), get_args(Labels))}")
        smallest = {"tasks.support": (support, 2), "tasks.query": (query, 2), "tasks.classes": (classes, 2)}
        for name, (value, least) in (smallest | {"seed": (seed, 0)}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; accepted: whole numbers from {least}.")
        if labels == "clusters":
            if classes > support:
                raise ConfigError(f"tasks.classes is {classes}; accepted: at most tasks.support, which is {support}.")
            if caption_features is None:
                raise ConfigError("tasks.labels is 'clusters', which needs caption_features [N, D]")
        counts = {"captions": len(captions)}
        if caption_features is not None:
            counts["caption features"] = len(caption_features)
        for name, count in counts.items():
            if count != len(clusters.topic):
                raise DataError(
                    f"there are {count:,} {name} for {len(clusters.topic):,} clustered pairs; cluster these pairs again"
                )
        self.captions, self.support, self.query, self.seed = captions, support, query, seed
        self.labels, self.classes, self._features = labels, classes, caption_features
        # Captions that are the same class name are not different: the tokenizer ignores case.
        self._texts = [words_of(caption).casefold() for caption in captions]
        by_domain = {key: self._by_text(rows) for key, rows in clusters.members().items()}
        needed = max(support, query)
        # Maps topic and domain to lists of pairs, one list per caption.
        self._pairs: dict[int, dict[int, list[list[int]]]] = {}
        for (topic, domain), groups in by_domain.items():
            if clusters.kept[topic, domain] and len(groups) >= needed:
                self._pairs.setdefault(topic, {})[domain] = groups
        self._pairs = {topic: domains for topic, domains in self._pairs.items() if len(domains) >= 2}
        self.usable = {topic: tuple(domains) for topic, domains in self._pairs.items()}
        if not self.usable:
            raise ConfigError(
                _no_usable_topic({key: len(groups) for key, groups in by_domain.items()}, clusters, needed)
            )

    def _by_text(self, rows: list[int]) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for row in rows:
            groups.setdefault(self._texts[row], []).append(row)
        return list(groups.values())

    def task(self, step: int, slot: int) -> Task:
        """Return the task number ``slot`` of the meta-batch of ``step``, both counted from 0."""
        generator = np.random.default_rng([self.seed, step, slot])
        topic = list(self.usable)[generator.integers(len(self.usable))]
        source, target = generator.choice(self.usable[topic], 2, replace=False).tolist()

        def drawn(domain: int, count: int) -> tuple[int, ...]:
            groups = self._pairs[topic][domain]
            chosen = [groups[position] for position in generator.choice(len(groups), count, replace=False)]
            return tuple(group[generator.integers(len(group))] for group in chosen)

        support, query = drawn(source, self.support), drawn(target, self.query)
        if self.labels == "captions":
            names = [tuple(self.captions[row] for row in rows) for rows in (support, query)]
            numbers = [tuple(range(len(rows))) for rows in (support, query)]
        else:
            names, numbers = self._pseudo_classes(support, query, int(generator.integers(2**32)))
        return Task(topic, source, target, support, query, names[0], numbers[0], names[1], numbers[1])

    def _pseudo_classes(
        self, support: tuple[int, ...], query: tuple[int, ...], seed: int
    ) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]]]:
        assert self._features is not None
        # One row per different caption; the captions of the support come first, and all of them differ.
        rows = [group[0] for group in self._by_text([*support, *query])]
        features = F.normalize(self._features[rows].detach().float().cpu(), dim=1)
        for count in (len(rows), len(support)):
            assigned, centres = spherical_kmeans(features[:count], self.classes, seed)
            present = assigned[: len(support)].unique()
            if len(present) > 1:
                break
        cosines = features @ centres[present].t()  # [captions, classes]
        labels = cosines.argmax(dim=1)
        other_class = labels[:, None] != torch.arange(len(present))
        nearest = cosines.masked_fill(other_class, float("-inf")).argmax(dim=0)
        names = tuple(self.captions[rows[position]] for position in nearest.tolist())
        label_of = {self._texts[row]: label for row, label in zip(rows, labels.tolist(), strict=True)}
        return [names, names], [tuple(label_of[self._texts[row]] for row in side) for side in (support, query)]


def _no_usable_topic(distinct: dict[tuple[int, int], int], clusters: Clusters, needed: int) -> str:
    """Return the reason why no task can be drawn: a table of topics, largest first, and the settings to lower."""
    topics: dict[int, list[tuple[int, bool]]] = {}
    for (topic, domain), count in distinct.items():
        topics.setdefault(topic, []).append((count, bool(clusters.kept[topic, domain])))
    # The second largest domain of a topic limits the size of its tasks.
    seconds = [sorted((count for count, kept in domains if kept), reverse=True)[1:2] for domains in topics.values()]
    largest = max((second[0] for second in seconds if second), default=0)
    lines = ["  topic  different captions in each domain (in brackets: dropped, fewer pairs than tasks.least)"]
    ranked = sorted(topics.items(), key=lambda item: -sum(count for count, _ in item[1]))
    for topic, domains in ranked[:20]:
        counts = ", ".join(f"{count}" if kept else f"({count})" for count, kept in sorted(domains, reverse=True))
        lines.append(f"  {topic:5d}  {counts}")
    if len(ranked) > 20:
        lines.append(f"  ... and {len(ranked) - 20} more topics")
    most = f"; {largest} at most for the domains that are now kept" if largest >= 2 else ""
    return (
        f"No topic has two domains of {needed} different captions each, as tasks.support and tasks.query require.\n"
        + "\n".join(lines)
        + "\nLower tasks.topics or tasks.domains for larger domains, tasks.least to keep small ones, or tasks.support "
        f"and tasks.query{most}."
    )
