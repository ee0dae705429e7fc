"""Runs a protocol's description: which data sets, shots and seeds, and which of the protocols' functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.domains import domain_generalisation
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.groups import dataset_names
from vlprompt.protocols.plan import load_all
from vlprompt.protocols.protocol_files import CONFIG, Protocol
from vlprompt.runs.run import Run


@dataclass(frozen=True)
class Overrides:
    """What a user wants otherwise than a protocol's description says; None for what stays.

    Attributes:
        seeds: Seeds of the shots and of the training.
        datasets: Data sets to train on.
        targets: Data sets to test on.
        shots: Training images per class.
    """

    seeds: Sequence[int] | None = None
    datasets: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    shots: Sequence[int] | None = None


def overridden(protocol: Protocol, own: Overrides) -> Protocol:
    """Return ``protocol`` with what the user wants otherwise.

    Raises:
        ConfigError: Targets for a protocol without other data sets, or several shots where it takes one; all problems
            are listed.
    """
    problems = []
    if own.targets is not None and protocol.test.part != "datasets":
        problems.append(f"--targets has no meaning for {protocol.name}, which does not test on other data sets")
    if own.shots is not None and len(own.shots) != 1 and protocol.test.part != "same":
        problems.append(f"--shots is {list(own.shots)}; {protocol.name} takes one number of images per class")
    if problems:
        raise ConfigError("\n".join(problems))
    train, test = protocol.train, protocol.test
    if own.datasets is not None:
        train = replace(train, data=tuple(own.datasets))
    if own.shots is not None:
        train = replace(train, shots=tuple(own.shots))
    if own.targets is not None:
        test = replace(test, data=tuple(own.targets))
    seeds = protocol.seeds if own.seeds is None else tuple(own.seeds)
    return replace(protocol, train=train, test=test, seeds=seeds)


def expanded(protocol: Protocol, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the configuration of every training, but for its seed and its domains.

    Raises:
        ConfigError: A data set or a group that is not known.
    """
    own = protocol.train.data == (CONFIG,)
    names = [] if own else dataset_names(protocol.train.data)
    found = []
    for config in configs:
        on_each = [config] if own else [config.with_data(name=name) for name in names]
        for one in on_each:
            shots = protocol.train.shots or (one.data.shots,)
            found += [one.with_data(classes=protocol.train.classes, shots=count) for count in shots]
    return found


def run_protocol(
    protocol: Protocol,
    configs: Sequence[RunConfig],
    overrides: Overrides | None = None,
    *,
    force: bool = False,
    report: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """Run every configuration as ``protocol`` says; return the results, which are kept in a file, and the tables.

    Finished runs are reused and unfinished ones resumed, so the same call goes on where it stopped.

    Args:
        protocol: What :func:`~vlprompt.protocols.protocol_files.find_protocol` gives.
        configs: What to compare; its data set, classes, shots and seed are the protocol's where that names any.
        overrides: What to do otherwise than the protocol says.
        force: Run everything anew.
        report: Called after every run.

    Raises:
        ConfigError: Nothing to run, something named twice or not known, or overrides that do not fit.
        DataError: Data sets that are missing: all of them, before anything is trained.
        VlpromptError: Whatever a single run raises.
    """
    protocol = overridden(protocol, overrides or Overrides())
    names = None if protocol.train.data == (CONFIG,) else dataset_names(protocol.train.data)
    more: dict[str, Any] = {"force": force, "report": report}
    if protocol.test.part == "same":
        return few_shot(configs, protocol.train.shots, protocol.seeds, datasets=names, **more)
    if protocol.train.shots:
        configs = [config.with_data(shots=protocol.train.shots[0]) for config in configs]
    every = expanded(protocol, configs)
    if protocol.test.part == "datasets":
        with_source = "mean_with_source" in protocol.report
        return cross_dataset(
            every, protocol.test.data, protocol.seeds, name=protocol.name, with_source=with_source, **more
        )
    # Before the first run, so that what is missing is not found out in the middle.
    load_all([config.data for config in every], protocol.seeds[0])
    if protocol.test.part == "halves":
        return base_to_new(configs, protocol.seeds, datasets=names, **more)
    return domain_generalisation(every, protocol.domain_protocol, protocol.seeds, **more)
