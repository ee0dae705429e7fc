"""Plans: the trainings of a protocol, each with the values that the recipe book has for its data set and shots.

A plan is made once, without data or weights, and is what is printed, checked and run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlprompt.config.run import Classes, DataConfig, RunConfig
from vlprompt.config.source import ConfigSource, Selection, as_source
from vlprompt.config.yaml import yaml_text
from vlprompt.datasets import find_card
from vlprompt.datasets.domains import DomainProtocol, DomainRound, card_rounds, domain_rounds
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods.registry import open_templates
from vlprompt.protocols.groups import dataset_names
from vlprompt.protocols.protocol_files import CONFIG, Part, Protocol

_LONGEST = 60
"""Characters of a value in the text of a plan."""


@dataclass(frozen=True)
class Training:
    """One training of a plan; its runs differ by their seed alone.

    Attributes:
        config: Its configuration. The seed is set for each run.
        values: Its values that differ from the method's base, by dotted key, and the data set's template where the
            configuration leaves it open.
        domains: The domains to train and to test on, in protocols over domains.
        targets: The other data sets to test on, in protocols that do.
    """

    config: RunConfig
    values: Mapping[str, Any]
    domains: DomainRound | None = None
    targets: tuple[DataConfig, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The trainings of a protocol.

    Attributes:
        name: The protocol's name.
        part: What is tested.
        seeds: Seeds of the shots and of the training.
        groups: The trainings of each configuration, in order.
        datasets: The data sets that the protocol names; None for each configuration's own.
        domains: Which domains are trained on, in protocols over domains.
        report: The averages that are reported.
    """

    name: str
    part: Part
    seeds: tuple[int, ...]
    groups: tuple[tuple[Training, ...], ...]
    datasets: tuple[str, ...] | None = None
    domains: DomainProtocol | None = None
    report: tuple[str, ...] = ()

    @property
    def trainings(self) -> list[Training]:
        """All trainings, in order."""
        return [training for group in self.groups for training in group]

    @property
    def configs(self) -> list[RunConfig]:
        """The configuration of every training."""
        return [training.config for training in self.trainings]

    def text(self) -> str:
        """Return a line per training: data set, classes, shots, and the values that differ from the method's base."""
        trainings, seeds = self.trainings, ", ".join(map(str, self.seeds))
        several = f"seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        head = f"{self.name}: {_counted(len(trainings), 'training')} with {several}"
        rows = [("method", "data", "classes", "shots", *self._domain_heading(), "values that differ from the base")]
        for training in trainings:
            data = training.config.data
            shots = "all" if data.shots == -1 else str(data.shots)
            values = "  ".join(f"{key}={_shortened(value)}" for key, value in training.values.items())
            rows.append((training.config.method, data.name, data.classes, shots, *_domain_words(training), values))
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = []
        for *cells, values in rows:
            aligned = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join([*aligned, values]).rstrip())
        tested = dict.fromkeys(tuple(data.name for data in training.targets) for training in trainings)
        ends = [f"tested on {', '.join(names)}" for names in tested if names]
        return "\n".join([head, *lines, *ends])

    def _domain_heading(self) -> tuple[str, ...]:
        return ("trained on", "tested on") if self.part == "domains" else ()


def _domain_words(training: Training) -> tuple[str, ...]:
    domains = training.domains
    return () if domains is None else (", ".join(domains.source), ", ".join(domains.target))


def _shortened(value: Any) -> str:
    text = _flat(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _flat(value: Any) -> str:
    """Return a value in one line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_flat, value))}]"
    return " ".join(yaml_text(value, flow=True).split())


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def make_plan(
    configs: Sequence[RunConfig | ConfigSource],
    seeds: Sequence[int],
    name: str,
    part: Part,
    *,
    classes: Classes = "all",
    datasets: Sequence[str] | None = None,
    shots: Sequence[int] = (),
    default_shots: int | None = None,
    domains: DomainProtocol | None = None,
    targets: Sequence[str] | None = None,
    report: Sequence[str] = (),
    dry: bool = False,
) -> Plan:
    """Return what a protocol trains, with the values of every training resolved.

    Args:
        configs: What to compare. A :class:`ConfigSource` gives each training the values that its recipe book has for
            the protocol, the data set and the shots; of a :class:`RunConfig` only data set and shots change.
        seeds: Seeds of the shots and of the training.
        name: The protocol's name, which chooses tables of the recipe books.
        part: What is tested.
        classes: Classes to train on.
        datasets: Names, aliases or groups of data sets to train on; None for each configuration's own.
        shots: Numbers of training images per class; empty for each configuration's own.
        default_shots: The number for configurations that name none.
        domains: Which domains are trained on, where ``part`` is ``domains``.
        targets: Names, aliases or groups of data sets to test on, where ``part`` is ``datasets``; else None.
        report: The averages that are reported.
        dry: Whether nothing will be run: where data are missing, the data set's card says which domains there are.

    Raises:
        ConfigError: Nothing to run, a name that is unknown or given twice, or values that are not accepted.
        DataError: The domains of a data set cannot be read, and ``dry`` is not set.
    """
    if not configs or not seeds:
        raise ConfigError(f"{name} needs at least one configuration and one seed, such as --seeds 1,2,3")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"a seed is given twice in {list(seeds)}; each seed is one draw")
    names = None if datasets is None else dataset_names(datasets)
    groups = []
    for source in map(as_source, configs):
        trainings: list[Training] = []
        for dataset in [None] if names is None else names:
            for count in shots or (None,):
                request: Selection = {
                    "protocol": name, "dataset": dataset, "shots": count, "default_shots": default_shots
                }  # fmt: skip
                config = source.resolve(**request).with_data(classes=classes)
                template = config.data.template or find_card(config.data.name).template
                filled = open_templates(config.method, config.settings, config.objectives, template)
                values = {**source.differences(**request), **filled}
                training = Training(config, values, targets=() if targets is None else _targets(config, targets))
                trainings += [training] if domains is None else _over_domains(training, domains, dry=dry)
        groups.append(tuple(trainings))
    chosen = None if names is None else tuple(names)
    return Plan(name, part, tuple(seeds), tuple(groups), chosen, domains, tuple(report))


def _targets(config: RunConfig, targets: Sequence[str]) -> tuple[DataConfig, ...]:
    """Return the data section of each target of ``config``."""
    source = config.data.name
    names = dataset_names(targets, "targets", leave_out=[source])
    if source in names:
        raise ConfigError(f"targets: {source!r} is the source of {config.method}; it is shown without being named")
    # Test images alone are used. Template, split and images of the source are no values of the targets.
    values: dict[str, Any] = {"shots": 1, "classes": "all", "source": (), "target": ()}
    values |= dict.fromkeys(("template", "split", "sampler", "shots_file"))
    return tuple(config.with_data(name=name, **values).data for name in names)


def _over_domains(training: Training, protocol: DomainProtocol, *, dry: bool) -> list[Training]:
    """Return ``training`` once per round of ``protocol``."""
    data = training.config.data
    try:
        rounds = domain_rounds(data.name, data.root, protocol)
    except DataError:
        if not dry:
            raise
        rounds = card_rounds(data.name, protocol)
    return [
        replace(training, domains=one, config=training.config.with_data(source=one.source, target=one.target))
        for one in rounds
    ]


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


def plan_protocol(
    protocol: Protocol,
    configs: Sequence[RunConfig | ConfigSource],
    overrides: Overrides | None = None,
    *,
    dry: bool = False,
) -> Plan:
    """Return the plan of a protocol's description.

    Where the protocol has one number of shots, a configuration that fixes another (ProGrad's 4, PromptKD's all) keeps
    it, unless ``overrides`` give a number. Arguments and errors are otherwise those of :func:`make_plan`.

    Raises:
        ConfigError: Targets for a protocol without other data sets, or several shots where it takes one; all problems
            are listed.
    """
    own, train, part = overrides or Overrides(), protocol.train, protocol.test.part
    problems = []
    if own.targets is not None and part != "datasets":
        problems.append(f"--targets has no meaning for {protocol.name}, which does not test on other data sets")
    if own.shots is not None and len(own.shots) != 1 and part != "same":
        problems.append(f"--shots is {list(own.shots)}; {protocol.name} takes one number of images per class")
    if problems:
        raise ConfigError("\n".join(problems))
    datasets, targets = own.datasets, None
    if part == "datasets":
        targets = protocol.test.data if own.targets is None else own.targets
    if datasets is None and train.data != (CONFIG,):
        datasets = train.data
    shots, default_shots = own.shots or (), None
    if own.shots is None and part == "same":
        shots = train.shots
    elif own.shots is None and train.shots:
        (default_shots,) = train.shots
    return make_plan(
        configs,
        protocol.seeds if own.seeds is None else own.seeds,
        protocol.name,
        part,
        classes=train.classes,
        datasets=datasets,
        shots=shots,
        default_shots=default_shots,
        domains=protocol.domain_protocol if part == "domains" else None,
        targets=targets,
        report=protocol.report,
        dry=dry,
    )
