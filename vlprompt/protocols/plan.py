"""Plans: the trainings of a protocol, each with the values of the recipe book for its data set and shots.

A plan is created once, without data or weights; it is printed, checked or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlprompt.config.keys import as_plain
from vlprompt.config.run import Classes, RunConfig
from vlprompt.config.source import ConfigSource, Selection, as_source
from vlprompt.config.yaml import yaml_text
from vlprompt.datasets import find_card
from vlprompt.datasets.catalogue import card_class_names
from vlprompt.datasets.domains import DomainProtocol, DomainRound, card_rounds, domain_rounds
from vlprompt.datasets.records import counted
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods.fitted import FittedMethod, check_known
from vlprompt.methods.registry import check_start, get_method_class, list_methods, open_templates
from vlprompt.protocols.groups import dataset_names
from vlprompt.protocols.protocol_files import CONFIG, Part, Protocol

_LONGEST = 60
"""Maximum length of a value in the text of a plan."""
_SHOWN = 3
"""Maximum number of values in the name of a variant."""


@dataclass(frozen=True)
class Training:
    """One training of a plan; its runs differ only in the seed.

    Attributes:
        config: The configuration. The seed is set for each run.
        values: Values that differ from the method's base, by dotted key, and the data set's template if the
            configuration does not set one.
        domains: The domains to train and to test on, in protocols over domains.
        targets: The other data sets to test on, if any. The head of the training is tested on ``config.data``; a method
            that learns from no labelled images runs with the whole ``config``, resolved for the target.
    """

    config: RunConfig
    values: Mapping[str, Any]
    domains: DomainRound | None = None
    targets: tuple[Training, ...] = ()

    @property
    def per_target(self) -> bool:
        """Whether the method runs on each target by itself (:attr:`PromptMethod.per_target`)."""
        return get_method_class(self.config.method).per_target


@dataclass(frozen=True)
class Plan:
    """The trainings of a protocol.

    Attributes:
        name: The protocol's name.
        part: The kind of test.
        seeds: Seeds of the shots and of the training.
        groups: The trainings of each configuration, in order.
        datasets: The data sets of the protocol; None for that of each configuration.
        domains: The training domains, in protocols over domains.
        report: The reported averages.
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

    @property
    def variants(self) -> list[str]:
        """The name of each group in tables: its method, with what tells it from other groups of the same method."""
        return variant_names([group[0].config for group in self.groups])

    @property
    def training_variants(self) -> list[str]:
        """The name of the group of each training."""
        return [name for name, group in zip(self.variants, self.groups, strict=True) for _ in group]

    def text(self) -> str:
        """Return a line per run: data set, classes, shots, and the values that differ from the method's base.

        Targets have lines if the method runs on each of them by itself, else they are listed.
        """
        trainings, seeds = self.trainings, ", ".join(map(str, self.seeds))
        several = f"seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        head = f"{self.name}: {counted(len(trainings), 'training')} with {several}"
        rows = [("method", "data", "classes", "shots", *self._domain_heading(), "values that differ from the base")]
        targets = [target for training in trainings if training.per_target for target in training.targets]
        rows += [_row(training) for training in (*trainings, *targets)]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = []
        for *cells, values in rows:
            aligned = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join([*aligned, values]).rstrip())
        first = 1 + len(trainings)
        if targets:
            lines.insert(first, "run on each target, with the values for it:")
        tested = dict.fromkeys(
            tuple(target.config.data.name for target in training.targets)
            for training in trainings
            if not training.per_target
        )
        lines[first:first] = [f"tested on {', '.join(names)}" for names in tested if names]
        return "\n".join([head, *lines])

    def _domain_heading(self) -> tuple[str, ...]:
        return ("trained on", "tested on") if self.part == "domains" else ()


def _row(training: Training) -> tuple[str, ...]:
    """Return the cells of a training in the text of a plan."""
    data = training.config.data
    shots = "all" if data.shots == -1 else str(data.shots)
    values = "  ".join(f"{key}={_shortened(value)}" for key, value in training.values.items())
    return training.config.method, data.name, data.classes, shots, *_domain_words(training), values


def _domain_words(training: Training) -> tuple[str, ...]:
    domains = training.domains
    return () if domains is None else (", ".join(domains.source), ", ".join(domains.target))


def _shortened(value: Any) -> str:
    text = _flat(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _flat(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_flat, value))}]"
    return " ".join(yaml_text(value, flow=True).split())


def variant_names(configs: Sequence[RunConfig]) -> list[str]:
    """Return different names for ``configs``: the method; its objectives and decomposition; the values that differ."""
    names = [config.method for config in configs]
    parts = ["+".join([config.method, *config.objectives, *config.decomposition]) for config in configs]
    values = [_flattened(as_plain(config)) for config in configs]
    for others in (parts, [_differing(index, values, parts) for index in range(len(configs))]):
        names = [other if names.count(name) > 1 else name for name, other in zip(names, others, strict=True)]
    return [f"{name} #{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _differing(index: int, values: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """Return the name of a configuration with its values that differ from those of others of the same name."""
    own = values[index]
    others = [other for other, part in zip(values, parts, strict=True) if part == parts[index]]
    keys = [key for key in own if key != "output" and any(other.get(key) != own[key] for other in others)]
    words = [f"{key.removeprefix('settings.')}={_shortened(own[key])}" for key in keys[:_SHOWN]]
    return " ".join([parts[index], *words])


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flattened(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


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
    """Return the plan of a protocol, with the values of every training resolved.

    Args:
        configs: The configurations to compare. A :class:`ConfigSource` resolves the values of its recipe book for the
            protocol, data set and shots of each training; in a :class:`RunConfig` only data set and shots change.
        seeds: Seeds of the shots and of the training.
        name: The protocol's name, which selects tables of the recipe books.
        part: The kind of test.
        classes: Classes to train on.
        datasets: Names, aliases or groups of data sets to train on; None for that of each configuration.
        shots: Numbers of training images per class; empty for that of each configuration.
        default_shots: The number for configurations that do not set it.
        domains: The training domains, if ``part`` is ``domains``.
        targets: Names, aliases or groups of data sets to test on, if ``part`` is ``datasets``; else None.
        report: The reported averages.
        dry: Whether nothing will be run: the domains of missing data are taken from the data set's card.

    Raises:
        ConfigError: There is nothing to run, a name is unknown or given twice, values are not accepted, or ``part`` is
            ``test-time`` and a method learns from labelled images.
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
                training = _training(source, request, classes)
                check_start(training.config.method, training.config.init_from)
                if part == "test-time" and not training.per_target:
                    accepted = ", ".join(method for method in list_methods() if get_method_class(method).per_target)
                    raise ConfigError(
                        f"{name} runs methods that learn from no labelled images, and {training.config.method} learns "
                        f"from them; accepted: {accepted}. Others: eval --protocol few-shot"
                    )
                if targets is not None:
                    training = replace(training, targets=_targets(source, training, targets, request))
                trainings += [training] if domains is None else _over_domains(training, domains, dry=dry)
        groups.append(tuple(trainings))
    chosen = None if names is None else tuple(names)
    return Plan(name, part, tuple(seeds), tuple(groups), chosen, domains, tuple(report))


def _training(source: ConfigSource, request: Selection, classes: Classes) -> Training:
    """Return the training of ``request``, with the values that differ from the method's base."""
    config = source.resolve(**request).with_data(classes=classes)
    texts = find_card(config.data.name).texts(config.data.template)
    filled = open_templates(config.method, config.settings, config.objectives, texts)
    return Training(config, {**_without(source.differences(**request), ["classes"]), **filled})


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return ``values`` without fields of ``data`` that the protocol decides."""
    decided = {f"data.{name}" for name in names}
    return {key: value for key, value in values.items() if key not in decided}


def _targets(
    source: ConfigSource, training: Training, targets: Sequence[str], request: Selection
) -> tuple[Training, ...]:
    """Return the targets of ``training``, which ``source`` resolved for ``request``."""
    config, first = training.config, training.config.data.name
    names = dataset_names(targets, "targets", leave_out=[first])
    if first in names:
        raise ConfigError(f"targets: {first!r} is the source of {config.method}; it is shown without being named")
    # Split, images and domains of the source do not apply to the targets.
    values: dict[str, Any] = {"source": (), "target": (), **dict.fromkeys(("split", "sampler", "shots_file"))}
    if training.per_target:
        own = (_training(source, {**request, "dataset": name}, "all") for name in names)
        return tuple(Training(target.config.with_data(**values), _without(target.values, values)) for target in own)
    if issubclass(get_method_class(config.method), FittedMethod):
        classes = {name: card_class_names(find_card(name)) for name in (first, *names)}
        for name in names:  # those whose cards have no class names are checked before the training
            if (known := classes[first]) is not None and (others := classes[name]) is not None:
                check_known(config.method, (first, known), (name, others))
    values |= {"shots": 1, "classes": "all", "template": None}  # only test images are used
    return tuple(Training(config.with_data(name=name, **values), {}) for name in names)


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
        replace(
            training,
            values=_without(training.values, ["source", "target"]),
            domains=domain_round,
            config=training.config.with_data(source=domain_round.source, target=domain_round.target),
        )
        for domain_round in rounds
    ]


@dataclass(frozen=True)
class Overrides:
    """User values that override a protocol's description; None keeps the value of the description.

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

    If the protocol has one number of shots, a configuration with a different number (ProGrad's 4, PromptKD's all) keeps
    it unless ``overrides`` set the shots. Other arguments and errors are those of :func:`make_plan`.

    Raises:
        ConfigError: Targets for a protocol without other data sets, or several shots for a protocol with one; the
            text lists all problems.
    """
    given, train, part = overrides or Overrides(), protocol.train, protocol.test.part
    problems = []
    if given.targets is not None and part != "datasets":
        problems.append(f"--targets has no meaning for {protocol.name}, which does not test on other data sets")
    if given.shots is not None and part == "test-time":
        problems.append(f"--shots has no meaning for {protocol.name}, which learns from no labelled images")
    elif given.shots is not None and len(given.shots) != 1 and part != "same":
        problems.append(f"--shots is {list(given.shots)}; {protocol.name} takes one number of images per class")
    if problems:
        raise ConfigError("\n".join(problems))
    datasets, targets = given.datasets, None
    if part == "datasets":
        targets = protocol.test.data if given.targets is None else given.targets
    if datasets is None and train.data != (CONFIG,):
        datasets = train.data
    shots, default_shots = given.shots or (), None
    if given.shots is None and part == "same":
        shots = train.shots
    elif given.shots is None and train.shots:
        (default_shots,) = train.shots
    return make_plan(
        configs,
        protocol.seeds if given.seeds is None else given.seeds,
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
