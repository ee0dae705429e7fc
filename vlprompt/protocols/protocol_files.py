"""Protocols as data: training, test and reported averages, read from YAML and validated.

The protocols of vlprompt are in ``assets/protocols``; a user's file is given by its path. A file contains only names
and numbers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from vlprompt.config.keys import keys_in, nest, sources
from vlprompt.config.types import Holds, Lines, MinLen, Positive, Seed, Words, validate, validated
from vlprompt.config.yaml import read_config, shown
from vlprompt.datasets.card import ASSETS
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

Part = Literal["same", "halves", "datasets", "domains", "test-time"]
CONFIG = "config"
"""In ``train.data``: the data set of the configuration."""
REPORTS: Mapping[str, tuple[str, ...]] = {
    "same": ("mean_of_datasets",),
    "halves": ("h_of_averages", "average_of_h"),
    "datasets": ("mean_of_targets", "mean_with_source"),
    "domains": ("mean_of_targets",),
    "test-time": ("mean_of_datasets", "mean_of_groups"),
}
"""Averages of each kind of test; the first is always reported, the others on request."""


def _different(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


def _is_file_name(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum()


Shots = Annotated[Literal[-1] | Positive, Words("1 or more images per class, or -1 for all of them")]
Names = Annotated[tuple[str, ...], Holds(_different, "a list of different names")]
SomeNames = Annotated[tuple[str, ...], MinLen(1), Holds(_different, "a list of one or more different names")]


@validated("train")
class Training:
    """The training of a protocol.

    Attributes:
        data: Data sets: names, ``group:NAME``, or only ``config`` for that of the configuration.
        classes: Classes.
        shots: Numbers of training images per class; empty for that of the configuration.
        domains: Domains per training, if ``test.part`` is ``domains``.
    """

    data: SomeNames
    classes: Literal["all", "base"]
    shots: Annotated[tuple[Shots, ...], Holds(_different, "a list of different numbers of images")] = ()
    domains: Literal["all", "all-but-one", "one"] = "all"

    def __post_init__(self) -> None:
        if CONFIG in self.data and len(self.data) > 1:
            raise ConfigError(
                f"train.data is {list(self.data)}; accepted: {CONFIG!r}, the configuration's own data set, alone"
            )


@validated("test")
class Testing:
    """The test of a protocol.

    Attributes:
        part: The ``same`` classes, base and new ``halves``, other ``datasets``, or unseen ``domains``. ``test-time`` is
            ``same`` for methods that learn from no labelled images.
        data: The other data sets, if ``part`` is ``datasets``.
    """

    part: Part
    data: Names = ()


@validated("")
class Protocol:
    """Description of a protocol.

    Attributes:
        schema: Version of the format.
        name: Name in tables and file names.
        about: Description in one or two sentences.
        train: The training.
        test: The test.
        seeds: Seeds of the shots and of the training.
        report: The reported averages.
    """

    schema: Annotated[Literal[1], Words("1, the schema that this version reads")]
    name: Annotated[str, Holds(_is_file_name, "letters, digits, - and _ (files are named after it)")]
    about: Lines
    train: Training
    test: Testing
    seeds: Annotated[tuple[Seed, ...], MinLen(1), Holds(_different, "a list of one or more different numbers")]
    report: Names

    @property
    def domain_protocol(self) -> Literal["leave-one-out", "single-source"]:
        """The name of the rounds in :func:`vlprompt.protocols.domains.domain_generalisation`."""
        return "leave-one-out" if self.train.domains == "all-but-one" else "single-source"

    def __post_init__(self) -> None:
        if problems := _contradictions(self):
            raise ConfigError("\n".join(problems))


def _contradictions(protocol: Protocol) -> list[str]:
    """Return the problems of the training and the report for the kind of test."""
    train, test, problems = protocol.train, protocol.test, []
    part = test.part
    if part != "same" and len(train.shots) > 1:
        problems.append(f"train.shots is {list(train.shots)}; several are for test.part: same")
    if part == "same" and not train.shots:
        problems.append("train.shots is empty; test.part: same compares numbers of shots, such as [1, 2, 4, 8, 16]")
    if part == "test-time" and train.shots:
        problems.append(f"train.shots is {list(train.shots)}; with test.part: test-time it has no meaning; omit it")
    classes = "base" if part == "halves" else "all"
    if train.classes != classes:
        problems.append(f"train.classes is {train.classes!r}; with test.part: {part} accepted: {classes!r}")
    if (part == "domains") == (train.domains == "all"):
        accepted = "'all-but-one' or 'one'" if part == "domains" else "'all'"
        problems.append(f"train.domains is {train.domains!r}; with test.part: {part} accepted: {accepted}")
    if (part == "datasets") != bool(test.data):
        text = "names the targets" if part == "datasets" else "has no meaning; omit it"
        problems.append(f"test.data is {list(test.data)}; with test.part: {part} it {text}")
    known = REPORTS[part]
    problems += [f"report: {name!r}.{did_you_mean(name, known)}" for name in protocol.report if name not in known]
    if known[0] not in protocol.report:
        problems.append(f"report is {list(protocol.report)}; with test.part: {part} it holds {known[0]!r}")
    return problems


def protocol_folder() -> Path:
    """Return the folder of the protocols in vlprompt."""
    return ASSETS / "protocols"


def list_protocols(pattern: str = "*") -> list[str]:
    """Return the sorted names of the protocols in vlprompt that match ``pattern`` (wildcards ``*`` and ``?``)."""
    return sorted(fnmatch.filter((path.stem for path in protocol_folder().glob("*.yaml")), pattern.lower()))


def find_protocol(name: str) -> Protocol:
    """Return the protocol ``name`` (``-``/``_`` and case are ignored), or the protocol in the file ``name``.

    Raises:
        ConfigError: There is no such protocol (the text has the nearest names), or the file has problems (all listed).
    """
    if name.lower().endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"protocol {shown(name)}: there is no such file; vlprompt's own: {_own()}")
        return read_protocol(Path(name))
    plain = name.lower().replace("_", "-")
    if plain in list_protocols():
        return read_protocol(protocol_folder() / f"{plain}.yaml")
    near = nearest(name, list_protocols(), 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"protocol is {shown(name)}; accepted: {_own()}, or a file of yours, my.yaml.{meant}")


def _own() -> str:
    return ", ".join(list_protocols())


def read_protocol(path: Path) -> Protocol:
    """Return the description in ``path``.

    Raises:
        ConfigError: The file cannot be read, or fields are unknown, missing, of a wrong type or contradictory; the
            text lists all problems.
    """
    problems: list[str] = []
    given = read_config(path, ("train", "test"), problems)
    values = nest({key: entry.value for key, entry in given.items()})
    protocol, wrong = validate(Protocol, values)
    for problem in wrong:
        keys = [problem.key, *keys_in(problem.text, given)]
        place = "" if problem.missing else f"{sources(keys, given)}: "
        problems.append(place + problem.text)
    if protocol is None or problems:
        raise ConfigError(f"the protocol {path} cannot be used:\n{bulleted(problems)}")
    return protocol
