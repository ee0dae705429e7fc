"""Domains of a data set: selection of source and target domains, and the rounds of domain generalisation protocols.

A clean domain has training images. Corrupted versions of its test images are separate domains: ``a+noise`` for ``a``.
The domains are read from the samples; the card gives their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vlprompt.datasets.card import Card
from vlprompt.datasets.catalogue import find_card
from vlprompt.datasets.readers import read_dataset
from vlprompt.datasets.records import Sample, SplitLists, labels_of
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

DomainProtocol = Literal["leave-one-out", "single-source"]
PROTOCOLS: tuple[str, ...] = get_args(DomainProtocol)
CLEAN = "clean"


@dataclass(frozen=True)
class DomainRound:
    """One training run of a protocol.

    Attributes:
        domain: The clean domain that is left out, or the single source.
        source: Domains to train on.
        target: Domains to test on.
    """

    domain: str
    source: tuple[str, ...]
    target: tuple[str, ...]


def split_domain(domain: str) -> tuple[str, str]:
    """Return the clean domain and the version: ``("a", "noise")`` for ``a+noise``, ``("a", "clean")`` for ``a``."""
    clean, _, version = domain.partition("+")
    return clean, version or CLEAN


def domains_of(card: Card, samples: Iterable[Sample]) -> list[str]:
    """Return the domains of ``samples``, in the card's order, corrupted versions after their clean domain."""
    position = {name: index for index, name in enumerate(card.domains)}

    def place(domain: str) -> tuple[int, bool]:
        clean, version = split_domain(domain)
        return position.get(clean, len(position)), version != CLEAN

    return sorted(dict.fromkeys(sample.domain for sample in samples), key=place)


def keep_domains(card: Card, lists: SplitLists, source: Sequence[str], target: Sequence[str]) -> SplitLists:
    """Return ``lists`` restricted to training and validation samples of ``source`` and test samples of ``target``.

    Args:
        card: The data set's card.
        lists: The complete data set, before any draw.
        source: Domains to train on; empty for all.
        target: Domains to test on; empty for all.

    Raises:
        ConfigError: If the data set has no domains, a name is not a domain or has no such images, or ``source`` leaves
            a class without training images; all problems are listed.
    """
    problems = []
    for key, names, samples, kind in (
        ("data.source", source, lists.train, "training"),
        ("data.target", target, lists.test, "test"),
    ):
        if isinstance(names, str):
            problems.append(f"{key} is the text {names!r}; accepted: a list of names, [{names!r}]")
        elif names and not card.domains:
            problems.append(f"{key} is {list(names)}, but {card.name} has no domains; omit it or leave it empty, []")
        else:
            problems += _name_problems(key, names, domains_of(card, samples), kind, card.name)
    if problems:
        raise ConfigError("\n".join(problems))
    train, val = (
        [sample for sample in samples if not source or sample.domain in source] for samples in (lists.train, lists.val)
    )
    present = {label for sample in train for label in labels_of(sample)}
    every = dict.fromkeys(label for sample in lists.train for label in labels_of(sample))
    lost = [lists.class_names[label] for label in every if label not in present]
    if lost:
        shown = ", ".join(map(repr, lost[:8])) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise ConfigError(
            f"data.source is {list(source)}, which leaves these classes without training images: {shown}. "
            "Name more domains to train on."
        )
    test = [sample for sample in lists.test if not target or sample.domain in target]
    return dataclasses.replace(lists, train=train, val=val, test=test)


def _name_problems(key: str, names: Sequence[str], known: Sequence[str], kind: str, data: str) -> list[str]:
    """Return the problems of ``names``; the domains in ``known`` have images of this ``kind``."""
    problems = [f"{key} names {name!r} twice" for name in dict.fromkeys(names) if list(names).count(name) > 1]
    for name in dict.fromkeys(names):
        if name not in known:
            near = did_you_mean(str(name), known)
            problems.append(f"{key} names {name!r}, which is not a domain of {data} with {kind} images.{near}")
    return problems


def check_protocol(protocol: str) -> None:
    """Raise :class:`~vlprompt.errors.ConfigError` unless ``protocol`` is one of :data:`PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        near = nearest(str(protocol), PROTOCOLS, 1)
        meant = f". Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"protocol is {protocol!r}; accepted: {' or '.join(PROTOCOLS)}{meant}")


def domain_rounds(name: str, root: str | Path | None, protocol: str) -> list[DomainRound]:
    """Return the training runs of ``protocol`` on data set ``name``, one per clean domain.

    ``leave-one-out`` trains on all clean domains but one and tests on that domain. ``single-source`` trains on one
    domain and tests on all others. Corrupted versions are tested with their clean domain.

    Args:
        name: Name or alias of a data set that has domains.
        root: Folder of the data sets, as in :func:`~vlprompt.datasets.load_dataset`.
        protocol: ``leave-one-out`` or ``single-source``.

    Raises:
        ConfigError: If the protocol or data set is unknown, there are fewer than two clean domains, a clean domain has
            no test images, or a round has no training images of a class.
        DataError: If the data are missing or cannot be used.
    """
    card = _checked(name, protocol)
    lists = read_dataset(card, root)
    clean, tested = domains_of(card, lists.train), domains_of(card, lists.test)
    if len(clean) < 2:
        raise ConfigError(f"{card.name} has training images of {clean} only; {protocol} needs two or more domains")
    # An empty target would mean all domains, including those of the training.
    if untested := [domain for domain in clean if domain not in tested]:
        raise ConfigError(f"{card.name} has no test images of {untested}; {protocol} tests on every clean domain")
    rounds, problems = _rounds(clean, tested, protocol), []
    for training in rounds:
        try:
            keep_domains(card, lists, training.source, training.target)
        except ConfigError as error:  # collected: the problems of all rounds are reported before any training
            problems.append(str(error))
    if problems:
        raise ConfigError(f"{protocol} cannot be run on {card.name}:\n{bulleted(problems)}")
    return rounds


def card_rounds(name: str, protocol: str) -> list[DomainRound]:
    """Return the training runs of ``protocol`` as far as the card of data set ``name`` tells: for plans without data.

    Corrupted versions are not among the targets, because a card does not name them.

    Raises:
        ConfigError: If the protocol or data set is unknown, or the data set has no domains.
    """
    names = list(_checked(name, protocol).domains)
    return _rounds(names, names, protocol)


def _checked(name: str, protocol: str) -> Card:
    check_protocol(protocol)
    card = find_card(name)
    if not card.domains:
        raise ConfigError(f"{card.name} has no domains; {protocol} needs a data set whose card names domains")
    return card


def _rounds(clean: Sequence[str], tested: Sequence[str], protocol: str) -> list[DomainRound]:
    """Return a training run for each domain of ``clean``, tested on those of ``tested`` that belong to its targets."""
    rounds = []
    for domain in clean:
        others = [other for other in clean if other != domain]
        source, targets = (others, [domain]) if protocol == "leave-one-out" else ([domain], others)
        target = [name for name in tested if split_domain(name)[0] in targets]
        rounds.append(DomainRound(domain, tuple(source), tuple(target)))
    return rounds
